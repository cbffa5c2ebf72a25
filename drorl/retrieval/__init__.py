"""From a query to its candidates: retrievers, and the corpora that they search."""

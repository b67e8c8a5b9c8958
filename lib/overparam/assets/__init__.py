"""What is fetched under pinned hashes: bundled weights and texts, and models that this project trained."""

"""Where text comes from: packaged corpora, the hub, and training pairs made of them."""

"""Pretraining data: prepare a token store from files of documents, and read it in chunks."""

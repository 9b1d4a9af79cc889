"""The token store of pretraining: from files of documents to chunks of tokens."""

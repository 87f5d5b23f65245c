"""Sources of other packages' formats: WebDataset tars, and data sets of Hugging Face (`datasets`) and of torchvision.

Read first: webdataset.py.
"""

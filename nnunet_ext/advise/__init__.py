"""`nnunet-ext advise`: what each method would be planned as for a data set and a GPU, and the one to take."""

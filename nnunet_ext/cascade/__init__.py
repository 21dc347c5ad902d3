"""`nnunet-ext cascade-predict`: both stages of a cascade on new scans."""

"""Which channels may become linear: forward from every linear map, through what they pass, to what reads them."""

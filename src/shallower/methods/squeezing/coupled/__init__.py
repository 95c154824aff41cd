"""Sites whose channels several layers write and read: streams of convolution stages, and what was followed to them."""

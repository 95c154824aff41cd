"""What `compress` decides by: the minutes it has, what work takes of them, and what people are told of the result."""

"""Methods inside other people's training loops; each file imports its library only when it is used itself."""

"""The methods: each decides the fates of channels and returns a plan."""

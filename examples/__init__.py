"""Things to run against a mesh, each in a folder of its own."""

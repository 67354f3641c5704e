module tutti.dev/tutti/examples/museum

go 1.26

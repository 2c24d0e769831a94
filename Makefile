.PHONY: test lint bench demo fmt

test:
	go run ./examples/testenv -- go test ./... ./examples/...

lint:
	.ci/run lint modules

bench:
	go run ./internal/bench

demo:
	go run ./examples/demo

fmt:
	go run mvdan.cc/gofumpt@v0.10.0 -w .

package outboxpg_test

import (
	"os"
	"strings"
	"testing"
)

// The snippet of the README is code that compiles: it is in example_test.go.
func TestReadmeSnippetIsTheExample(t *testing.T) {
	readme, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	example, err := os.ReadFile("example_test.go")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, found := strings.Cut(string(readme), "```go\n")
	snippet, _, closed := strings.Cut(rest, "```")
	if !found || !closed {
		t.Fatal("README.md has no Go snippet")
	}
	if !strings.Contains(string(example), snippet) {
		t.Error("the snippet of README.md is not in example_test.go as it stands there")
	}
}

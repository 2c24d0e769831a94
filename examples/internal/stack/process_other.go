//go:build !unix

package stack

import (
	"os"
	"os/exec"
)

type account struct{}

func unprivileged() (*account, error) { return nil, nil }

func (*account) own(string) error { return nil }

func detach(*exec.Cmd, *account) {}

func makeDir() (string, error) { return os.MkdirTemp("", "ashlar-stack-") }

// startWatchdog does nothing: without Close, servers outlive a killed program.
func startWatchdog(string) (func(), error) { return func() {}, nil }

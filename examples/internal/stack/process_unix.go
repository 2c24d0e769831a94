//go:build unix

package stack

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"
)

// account is the user that a server runs as; nil is the current one.
type account struct{ uid, gid int }

// unprivileged returns the account for a server that refuses to run as root.
func unprivileged() (*account, error) {
	if os.Geteuid() != 0 {
		return nil, nil
	}
	for _, name := range []string{"postgres", "nobody"} {
		u, err := user.Lookup(name)
		if err != nil {
			continue
		}
		uid, err1 := strconv.Atoi(u.Uid)
		gid, err2 := strconv.Atoi(u.Gid)
		if err1 == nil && err2 == nil {
			return &account{uid, gid}, nil
		}
	}
	return nil, errors.New("it refuses to run as root, and this machine has neither a user postgres nor nobody; run as an ordinary user")
}

func (a *account) own(path string) error {
	if a == nil {
		return nil
	}
	return os.Chown(path, a.uid, a.gid)
}

// detach gives cmd a process group of its own, so that Ctrl-C reaches only the
// program that decides when its servers go, and the account.
func detach(cmd *exec.Cmd, a *account) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if a != nil {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uint32(a.uid), Gid: uint32(a.gid)}
	}
}

// makeDir creates a folder that servers under another account can reach.
func makeDir() (string, error) {
	parent := os.TempDir()
	if os.Geteuid() == 0 && !open(parent) {
		parent = "/tmp"
	}
	dir, err := os.MkdirTemp(parent, "ashlar-stack-")
	if err != nil {
		return "", fmt.Errorf("stack: temporary folder: %w", err)
	}
	return dir, os.Chmod(dir, 0o711)
}

// open reports whether every user may enter path.
func open(path string) bool {
	for {
		info, err := os.Stat(path)
		if err != nil || info.Mode()&fs.FileMode(0o001) == 0 {
			return false
		}
		parent := filepath.Dir(path)
		if parent == path {
			return true
		}
		path = parent
	}
}

// The watchdog reads a pipe whose other end only this process holds. When that
// closes and the folder is still there, this process died without Close.
const watchdogScript = `trap '' INT TERM HUP
cat >/dev/null
cd "$1" 2>/dev/null || exit 0
for f in *.container; do [ -f "$f" ] && docker rm -f -v "$(cat "$f")" >/dev/null 2>&1; done
for f in *.pid; do [ -f "$f" ] && read -r sig pid <"$f" && kill -"$sig" "$pid" 2>/dev/null; done
for f in *.pid; do
	[ -f "$f" ] && read -r sig pid <"$f" || continue
	for i in 1 2 3 4 5 6 7 8 9 10; do kill -0 "$pid" 2>/dev/null || break; sleep 1; done
	kill -9 "$pid" 2>/dev/null
done
cd / && rm -rf "$1"`

// startWatchdog returns a function that ends the watchdog.
func startWatchdog(dir string) (func(), error) {
	cmd := exec.Command("/bin/sh", "-c", watchdogScript, "sh", dir)
	detach(cmd, nil)
	pipe, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("stack: watchdog: %w", err)
	}
	return func() {
		_ = pipe.Close()
		_ = cmd.Wait() // its status says nothing
	}, nil
}

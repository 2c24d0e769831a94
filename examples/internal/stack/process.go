package stack

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"sync"
	"syscall"
	"time"
)

// A process is a server started from a binary.
type process struct {
	cmd    *exec.Cmd
	gone   chan struct{} // closed when it has exited
	output *tail
}

// spawn starts a program that dies with this process, even if that is killed.
func spawn(user *account, dir string, env []string, path string, args ...string) (*process, error) {
	p := &process{cmd: exec.Command(path, args...), gone: make(chan struct{}), output: &tail{}}
	p.cmd.Dir, p.cmd.Stdout, p.cmd.Stderr = dir, p.output, p.output
	p.cmd.Env = append(os.Environ(), env...)
	p.cmd.SysProcAttr = dieWithParent()
	if user != nil {
		user.apply(p.cmd.SysProcAttr)
	}
	started := make(chan error)
	go func() {
		// The death signal is bound to the thread that starts the child.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		if err := p.cmd.Start(); err != nil {
			started <- err
			return
		}
		started <- nil
		_ = p.cmd.Wait() // stop is told by gone; the status of a stopped server says nothing
		close(p.gone)
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start %s: %w", path, err)
	}
	return p, nil
}

// stop sends sig, and kills the process if that does not end it.
func (p *process) stop(sig syscall.Signal) error {
	select {
	case <-p.gone:
		return nil
	default:
	}
	_ = p.cmd.Process.Signal(sig) // it may have exited just now
	select {
	case <-p.gone:
		return nil
	case <-time.After(20 * time.Second):
	}
	_ = p.cmd.Process.Kill()
	<-p.gone
	return fmt.Errorf("%s had to be killed", filepath.Base(p.cmd.Path))
}

// A tail keeps the end of a program's output, for error messages.
type tail struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (t *tail) Write(b []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.buf.Write(b)
	if over := t.buf.Len() - 4096; over > 0 {
		t.buf.Next(over)
	}
	return len(b), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.buf.String()
}

// freePort returns a TCP port on loopback that nobody uses now.
func freePort() (int, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port, nil
}

// tempDir makes a folder that user owns, in a place that user can reach.
func tempDir(user *account, pattern string) (string, error) {
	dir, err := os.MkdirTemp("", pattern)
	if err != nil || user == nil {
		return dir, err
	}
	return dir, os.Chown(dir, user.uid, user.gid)
}

func hostPort(port int) string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(port)) }

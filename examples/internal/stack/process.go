package stack

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// program is a server that runs as a process of this machine.
type program struct {
	run  *run
	name string // names its folder and files under run.dir
	dir  string // its data, owned by its account
	acct *account
	env  []string
	argv func(port int) []string
	// probe must fail for another program that took the port.
	probe probe
	// gentle lets it finish, crash does not; both end it.
	gentle, crash syscall.Signal
	// finish, if set, lets it save its data before a gentle stop.
	finish func(ctx context.Context, port int) error

	port int
	cmd  *exec.Cmd
	done chan struct{} // closed when the process has ended
}

func newProgram(r *run, name string, acct *account) (*program, error) {
	p := &program{run: r, name: name, dir: filepath.Join(r.dir, name), acct: acct, gentle: syscall.SIGTERM, crash: syscall.SIGKILL}
	if err := os.Mkdir(p.dir, 0o700); err != nil {
		return nil, err
	}
	return p, acct.own(p.dir)
}

// launch starts the program on a free port and returns its version.
func (p *program) launch(ctx context.Context) (string, error) {
	var err error
	for range 4 {
		if p.port, err = freePort(); err != nil {
			break
		}
		var version string
		if version, err = p.try(ctx); err == nil {
			return version, nil
		}
		if !portTaken(err) {
			break
		}
	}
	return "", errors.Join(err, p.close())
}

func (p *program) start(ctx context.Context) error {
	for {
		_, err := p.try(ctx)
		// An outgoing connection may sit on the port for a moment.
		if err == nil || !portTaken(err) || ctx.Err() != nil {
			return err
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// try runs the program once and waits until it answers.
func (p *program) try(ctx context.Context) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, p.run.timeout)
	defer cancel()
	logPath := filepath.Join(p.run.dir, p.name+".log")
	log, err := os.Create(logPath)
	if err != nil {
		return "", err
	}
	defer log.Close()
	argv := p.argv(p.port)
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = p.dir, log, log
	cmd.Env = append([]string{"PATH=" + os.Getenv("PATH"), "LC_ALL=C", "HOME=" + p.dir}, p.env...)
	detach(cmd, p.acct)
	if err := cmd.Start(); err != nil {
		return "", err
	}
	p.cmd, p.done = cmd, make(chan struct{})
	pidFile := filepath.Join(p.run.dir, p.name+".pid")
	err = os.WriteFile(pidFile, fmt.Appendf(nil, "%d %d\n", int(p.crash), cmd.Process.Pid), 0o600)
	go func() {
		_ = cmd.Wait()
		_ = os.Remove(pidFile)
		close(p.done)
	}()
	var version string
	if err == nil {
		version, err = ready(ctx, p.done, p.port, p.probe)
	}
	if err != nil {
		_ = p.stop(context.WithoutCancel(ctx), true)
		return "", fmt.Errorf("%s: %w\n%s", argv[0], err, tail(logPath))
	}
	return version, nil
}

func (p *program) stop(ctx context.Context, immediate bool) error {
	if p.cmd == nil {
		return nil
	}
	sig := p.gentle
	if immediate {
		sig = p.crash
	} else if p.finish != nil {
		if err := p.finish(ctx, p.port); err != nil {
			return err
		}
	}
	grace := time.NewTimer(20 * time.Second)
	defer grace.Stop()
	_ = p.cmd.Process.Signal(sig)
	select {
	case <-p.done:
		return nil
	case <-ctx.Done():
	case <-grace.C:
	}
	_ = p.cmd.Process.Kill()
	<-p.done
	return nil
}

func (p *program) close() error {
	return errors.Join(p.stop(context.Background(), true), os.RemoveAll(p.dir))
}

// tail returns the last lines of a file.
func tail(path string) string {
	text, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	return lastLines(string(text))
}

func lastLines(text string) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return strings.Join(lines[max(0, len(lines)-12):], "\n")
}

// command runs a helper program to its end.
func command(ctx context.Context, acct *account, dir string, argv ...string) error {
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Dir = dir
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "LC_ALL=C", "HOME=" + dir}
	detach(cmd, acct)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w\n%s", argv[0], err, strings.TrimSpace(string(out)))
	}
	return nil
}

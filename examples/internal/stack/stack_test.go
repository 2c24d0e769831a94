package stack

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/redis/go-redis/v9"
	"github.com/testcontainers/testcontainers-go"
	"github.com/twmb/franz-go/pkg/kgo"
)

func TestMain(m *testing.M) {
	if how := os.Getenv("STACK_TEST_HELPER"); how != "" {
		helper(how)
	}
	os.Exit(m.Run())
}

// begin starts servers of a class that are not shared with another test.
func begin(t *testing.T, class Provider, backends ...string) *Stack {
	t.Helper()
	if class == Docker {
		needEngine(t)
	}
	t.Setenv("ASHLAR_STACK", string(class))
	s, err := Start(t.Context(), &Options{Private: true, Backends: backends, Log: testLog{t}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
		if left := leftovers(s.run.dir); len(left) > 0 {
			t.Errorf("left behind: %q", left)
		}
	})
	return s
}

// needEngine skips a test without an engine, or images that it would have to
// download. With ASHLAR_STACK=docker these are there: the test goes on, and fails.
func needEngine(t *testing.T) {
	t.Helper()
	if os.Getenv("ASHLAR_STACK") == "docker" {
		return
	}
	if err := engineAnswers(t.Context()); err != nil {
		t.Skip(err)
	}
	engine, err := testcontainers.NewDockerClientWithOpts(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer engine.Close()
	for name := range images {
		if _, err := engine.ImageInspect(t.Context(), image(name)); err != nil {
			t.Skip(err)
		}
	}
}

type testLog struct{ t *testing.T }

func (l testLog) Write(b []byte) (int, error) {
	l.t.Logf("%s", strings.TrimSpace(string(b)))
	return len(b), nil
}

// leftovers lists what remains of a stack: its folder, processes whose command
// line names it, and containers.
func leftovers(dir string) []string {
	var left []string
	if _, err := os.Stat(dir); err == nil {
		left = append(left, dir)
	}
	if out, err := exec.Command("ps", "-eo", "pid,args").Output(); err == nil {
		for line := range strings.Lines(string(out)) {
			if strings.Contains(line, dir) {
				left = append(left, strings.TrimSpace(line))
			}
		}
	}
	if out, err := exec.Command("docker", "ps", "-aq", "--filter", "name="+filepath.Base(dir)).Output(); err == nil && len(out) > 0 {
		left = append(left, "container "+strings.TrimSpace(string(out)))
	}
	return left
}

// write stores a value in the server and read returns it, by the means that the
// patterns need: prepared transactions, transactions of Kafka.
func write(t *testing.T, svc *Service, value string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	err := func() error {
		switch svc.Name {
		case Postgres:
			conn, err := pgx.Connect(ctx, svc.Address)
			if err != nil {
				return err
			}
			defer conn.Close(ctx)
			_, err = conn.Exec(ctx, "DROP TABLE IF EXISTS v; CREATE TABLE v (v text); BEGIN; INSERT INTO v VALUES ('"+value+"'); PREPARE TRANSACTION 'p'")
			if err == nil {
				_, err = conn.Exec(ctx, "COMMIT PREPARED 'p'")
			}
			return err
		case Redis:
			client := redisClient(t, svc)
			return client.Set(ctx, "v", value, 0).Err()
		default:
			client, err := kgo.NewClient(kgo.SeedBrokers(svc.Address), kgo.TransactionalID("t"), kgo.AllowAutoTopicCreation())
			if err != nil {
				return err
			}
			defer client.Close()
			if err := client.BeginTransaction(); err != nil {
				return err
			}
			if err := client.ProduceSync(ctx, &kgo.Record{Topic: "v", Value: []byte(value)}).FirstErr(); err != nil {
				return err
			}
			return client.EndTransaction(ctx, kgo.TryCommit)
		}
	}()
	if err != nil {
		t.Fatalf("%s: write: %v", svc.Name, err)
	}
}

func read(t *testing.T, svc *Service) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	value, err := func() (value string, err error) {
		switch svc.Name {
		case Postgres:
			conn, err := pgx.Connect(ctx, svc.Address)
			if err != nil {
				return "", err
			}
			defer conn.Close(ctx)
			err = conn.QueryRow(ctx, "SELECT v FROM v").Scan(&value)
			return value, err
		case Redis:
			return redisClient(t, svc).Get(ctx, "v").Result()
		default:
			client, err := kgo.NewClient(kgo.SeedBrokers(svc.Address), kgo.ConsumeTopics("v"), kgo.FetchIsolationLevel(kgo.ReadCommitted()))
			if err != nil {
				return "", err
			}
			defer client.Close()
			for {
				fetches := client.PollFetches(ctx)
				if ctx.Err() != nil {
					return "", ctx.Err()
				}
				for r := range fetches.RecordsAll() {
					return string(r.Value), nil
				}
			}
		}
	}()
	if err != nil && !errors.Is(err, redis.Nil) {
		t.Fatalf("%s: read: %v", svc.Name, err)
	}
	return value
}

func redisClient(t *testing.T, svc *Service) *redis.Client {
	t.Helper()
	opts, err := redis.ParseURL(svc.Address)
	if err != nil {
		t.Fatal(err)
	}
	client := redis.NewClient(opts)
	t.Cleanup(func() { client.Close() })
	return client
}

func TestStopAndStart(t *testing.T) {
	for _, class := range []Provider{Embedded, Local, Docker} {
		t.Run(string(class), func(t *testing.T) {
			s := begin(t, class)
			for _, svc := range s.services {
				t.Run(svc.Name, func(t *testing.T) {
					if svc.Version == "" {
						t.Error("no version")
					}
					write(t, svc, "one")
					if err := svc.Stop(t.Context(), false); err != nil {
						t.Fatal(err)
					}
					if version, err := ask(t.Context(), svc); err == nil {
						t.Fatalf("a stopped server answers: %s", version)
					}
					if err := svc.Start(t.Context()); err != nil {
						t.Fatal(err)
					}
					if got := read(t, svc); got != "one" {
						t.Fatalf("after a stop and a start: %q, want one", got)
					}
					if err := svc.Restart(t.Context(), true); err != nil {
						t.Fatal(err)
					}
					want := "one"
					if svc.Name == Redis && class == Embedded {
						want = "" // no snapshot to fall back to
					}
					if got := read(t, svc); got != want {
						t.Fatalf("after a crash: %q, want %q", got, want)
					}
				})
			}
		})
	}
}

func TestKeysExpire(t *testing.T) {
	client := redisClient(t, begin(t, Embedded, Redis).Service(Redis))
	if err := client.Set(t.Context(), "long", 1, time.Hour).Err(); err != nil {
		t.Fatal(err)
	}
	if err := client.Set(t.Context(), "short", 1, 20*time.Millisecond).Err(); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the short key has expired", func() bool {
		return client.Exists(t.Context(), "short").Val() == 0
	})
	if left := client.TTL(t.Context(), "long").Val(); left <= 0 || left >= time.Hour {
		t.Errorf("the long key has %v left", left)
	}
}

// ask returns the server's version, with little patience.
func ask(ctx context.Context, svc *Service) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	switch svc.Name {
	case Postgres:
		return pgVersion(ctx, svc.Address)
	case Redis:
		version, _, err := redisVersion(ctx, svc.Address)
		return version, err
	default:
		return kafkaVersion(ctx, svc.Address)
	}
}

func TestParallelStacks(t *testing.T) {
	t.Setenv("ASHLAR_STACK", "local")
	const n = 4
	stacks := make([]*Stack, n)
	errs := make([]error, n)
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() { stacks[i], errs[i] = Start(t.Context(), &Options{Private: true}) })
	}
	wg.Wait()
	for i, s := range stacks {
		if errs[i] != nil {
			t.Fatal(errs[i])
		}
		defer s.Close()
		for _, svc := range s.services {
			write(t, svc, strconv.Itoa(i))
		}
	}
	for i, s := range stacks {
		for _, svc := range s.services {
			if got := read(t, svc); got != strconv.Itoa(i) {
				t.Errorf("stack %d: %s holds %q: two stacks share a server", i, svc.Name, got)
			}
		}
	}
	for i, s := range stacks {
		if err := s.Close(); err != nil {
			t.Errorf("stack %d: %v", i, err)
		}
		if left := leftovers(s.run.dir); len(left) > 0 {
			t.Errorf("stack %d left behind: %q", i, left)
		}
	}
}

// A server that comes back waits for its port.
func TestStartWaitsForThePort(t *testing.T) {
	s := begin(t, Local, Postgres)
	svc := s.Service(Postgres)
	write(t, svc, "one")
	if err := svc.Stop(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	p := svc.inst.(*program)
	squatter := listen(t, p.port)
	started := make(chan error, 1)
	go func() { started <- svc.Start(t.Context()) }()
	for { // until it has failed once at least
		if log := tail(filepath.Join(s.run.dir, "postgres.log")); portTaken(errors.New(log)) {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	squatter.Close()
	if err := <-started; err != nil {
		t.Fatal(err)
	}
	if got := read(t, svc); got != "one" {
		t.Fatalf("got %q", got)
	}
}

// helper is a program that is killed while its stack runs.
func helper(how string) {
	if how == "no watchdog" {
		watchdog = func(string) (func(), error) { return func() {}, nil }
	}
	s, err := Start(context.Background(), &Options{Private: true})
	if err != nil {
		fmt.Println("error:", err)
		os.Exit(1)
	}
	fmt.Println(s.run.dir)
	_, _ = io.Copy(io.Discard, os.Stdin) // never ends
}

func TestKilledProgram(t *testing.T) {
	for _, class := range []Provider{Local, Docker} {
		t.Run(string(class), func(t *testing.T) {
			if class == Docker {
				needEngine(t)
			}
			dir := kill(t, class, "watched")
			waitFor(t, "nothing is left", func() bool { return len(leftovers(dir)) == 0 })
		})
	}
	// Without the watchdog the same check sees what is left.
	t.Run("unwatched", func(t *testing.T) {
		dir := kill(t, Local, "no watchdog")
		left := leftovers(dir)
		if !slices.ContainsFunc(left, func(line string) bool { return strings.Contains(line, "bin/postgres") }) {
			t.Errorf("the check misses the server of a killed program: %q", left)
		}
		end, err := startWatchdog(dir)
		if err != nil {
			t.Fatal(err)
		}
		end() // it takes this for the death of the program
		if left := leftovers(dir); len(left) > 0 {
			t.Errorf("left behind: %q", left)
		}
	})
}

// kill runs a helper, kills it when its servers run, and returns their folder.
func kill(t *testing.T, class Provider, how string) string {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "STACK_TEST_HELPER="+how, "ASHLAR_STACK="+string(class))
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer stdin.Close()
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(stdout)
	if !lines.Scan() || !strings.HasPrefix(lines.Text(), "/") {
		t.Fatalf("the helper says %q: %v", lines.Text(), cmd.Wait())
	}
	dir := lines.Text()
	if len(leftovers(dir)) < 2 {
		t.Fatalf("no servers in %s", dir)
	}
	if err := cmd.Process.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	return dir
}

func waitFor(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !cond(); {
		if time.Now().After(deadline) {
			t.Fatalf("not so: %s", what)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// A start that is cancelled halfway takes down what runs already.
func TestCancelledStart(t *testing.T) {
	for _, class := range []Provider{Local, Docker} {
		t.Run(string(class), func(t *testing.T) {
			if class == Docker {
				needEngine(t)
			}
			t.Setenv("ASHLAR_STACK", string(class))
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			var dir string
			plain := watchdog
			watchdog = func(d string) (func(), error) {
				dir = d
				return plain(d)
			}
			defer func() { watchdog = plain }()
			s, err := Start(ctx, &Options{Private: true, Log: writerFunc(func(line string) {
				if strings.Contains(line, "redis: ready") {
					cancel() // Postgres makes its files, Kafka loads its classes
				}
			})})
			if err == nil {
				s.Close()
				t.Skip("all servers were as quick as Redis")
			}
			if !errors.Is(err, context.Canceled) {
				t.Errorf("got %v, want context.Canceled", err)
			}
			if left := leftovers(dir); len(left) > 0 {
				t.Errorf("left behind: %q", left)
			}
		})
	}
}

// A container that ends tells why.
func TestContainerThatEnds(t *testing.T) {
	needEngine(t)
	// Redis' image knows nothing of Postgres' arguments.
	t.Setenv("ASHLAR_IMAGE_POSTGRES", image(Redis))
	t.Setenv("ASHLAR_STACK", "docker")
	s, err := Start(t.Context(), &Options{Private: true, Backends: []string{Postgres}})
	if err == nil {
		s.Close()
		t.Fatal("it started")
	}
	if text := err.Error(); !strings.Contains(text, "ended with status") || !strings.Contains(text, "ASHLAR_IMAGE_POSTGRES") {
		t.Errorf("got %v", err)
	}
}

type writerFunc func(line string)

func (f writerFunc) Write(b []byte) (int, error) {
	f(string(b))
	return len(b), nil
}

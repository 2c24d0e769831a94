package stack

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5/pgproto3"
)

func TestEnvironment(t *testing.T) {
	nobody, err := freePort()
	if err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name, backend, address string
		want                   []string
	}{
		{"no Postgres", Postgres, fmt.Sprintf("postgres://u@%s/db", hostPort(nobody)), []string{"TEST_POSTGRES_URL", "does not answer", "unset TEST_POSTGRES_URL"}},
		{"no DSN", Postgres, "postgres//oops", []string{"TEST_POSTGRES_URL", "correct the address"}},
		{"old Postgres", Postgres, "postgres://u@" + oldPostgres(t) + "/db?sslmode=disable", []string{"too old", "Postgres 14.9", "15.0 or newer", "TEST_POSTGRES_URL"}},
		{"no Redis", Redis, "redis://" + hostPort(nobody), []string{"TEST_REDIS_URL", "does not answer"}},
		{"no URL", Redis, "localhost:6379", []string{"TEST_REDIS_URL", "correct the address"}},
		{"old Redis", Redis, "redis://" + oldRedis(t), []string{"too old", "Redis 6.0.16", "6.2 or newer", "TEST_REDIS_URL"}},
		{"no Kafka", Kafka, hostPort(nobody), []string{"TEST_KAFKA_SEEDS", "does not answer"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Setenv("ASHLAR_STACK", "")
			t.Setenv(variables[tt.backend], tt.address)
			s, err := Start(t.Context(), &Options{Backends: []string{tt.backend}})
			if err == nil {
				s.Close()
				t.Fatal("an unusable address was accepted, or something else started in its place")
			}
			for _, want := range tt.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("the error lacks %q: %v", want, err)
				}
			}
		})
	}
}

func TestServersOfTheEnvironmentAreLeftAlone(t *testing.T) {
	owner := begin(t, Embedded, Redis)
	t.Setenv("ASHLAR_STACK", "")
	t.Setenv("TEST_REDIS_URL", owner.Service(Redis).Address)
	s, err := Start(t.Context(), &Options{Backends: []string{Redis}})
	if err != nil {
		t.Fatal(err)
	}
	svc := s.Service(Redis)
	if svc.Provider != Env {
		t.Errorf("provider %s", svc.Provider)
	}
	for _, err := range []error{svc.Stop(t.Context(), true), svc.Start(t.Context()), svc.Restart(t.Context(), false)} {
		if !errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("got %v, want errors.ErrUnsupported", err)
		}
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if _, err := ask(t.Context(), svc); err != nil {
		t.Errorf("Close stopped it: %v", err)
	}
}

func TestAtLeast(t *testing.T) {
	for _, tt := range []struct {
		version      string
		major, minor int
		ok           bool
	}{
		{"15.0", 15, 0, true},
		{"15", 15, 0, true},
		{"14.12", 15, 0, false},
		{"17beta1", 15, 0, true},
		{"9.6.24", 15, 0, false},
		{"6.2.14", 6, 2, true},
		{"6.0.16", 6, 2, false},
		{"7.0.0", 6, 2, true},
		{"10.1", 6, 2, true},
		{"", 6, 2, true}, // it does not tell
	} {
		if err := atLeast("X", tt.version, tt.major, tt.minor); (err == nil) != tt.ok {
			t.Errorf("%q at least %d.%d: %v", tt.version, tt.major, tt.minor, err)
		}
	}
}

// oldPostgres answers as Postgres 14 would.
func oldPostgres(t *testing.T) string {
	return serve(t, func(conn net.Conn) {
		b := pgproto3.NewBackend(conn, conn)
		if _, err := b.ReceiveStartupMessage(); err != nil {
			return
		}
		b.Send(&pgproto3.AuthenticationOk{})
		b.Send(&pgproto3.ParameterStatus{Name: "server_version", Value: "14.9"})
		b.Send(&pgproto3.ReadyForQuery{TxStatus: 'I'})
		for b.Flush() == nil {
			msg, err := b.Receive()
			if err != nil {
				return
			}
			switch msg.(type) {
			case *pgproto3.Parse:
				b.Send(&pgproto3.ParseComplete{})
			case *pgproto3.Describe:
				b.Send(&pgproto3.ParameterDescription{ParameterOIDs: []uint32{25}})
				b.Send(&pgproto3.RowDescription{Fields: []pgproto3.FieldDescription{{Name: []byte("v"), DataTypeOID: 25, DataTypeSize: -1}}})
			case *pgproto3.Bind:
				b.Send(&pgproto3.BindComplete{})
			case *pgproto3.Execute:
				b.Send(&pgproto3.DataRow{Values: [][]byte{[]byte("14.9 (Debian 14.9-1)")}})
				b.Send(&pgproto3.CommandComplete{CommandTag: []byte("SELECT 1")})
			case *pgproto3.Sync:
				b.Send(&pgproto3.ReadyForQuery{TxStatus: 'I'})
			}
		}
	})
}

// oldRedis answers as Redis 6.0 would.
func oldRedis(t *testing.T) string {
	return serve(t, func(conn net.Conn) {
		in := bufio.NewScanner(conn)
		for in.Scan() {
			switch strings.ToUpper(in.Text()) {
			case "PING":
				fmt.Fprint(conn, "+PONG\r\n")
			case "INFO":
				const info = "# Server\r\nredis_version:6.0.16\r\nprocess_id:1\r\n"
				fmt.Fprintf(conn, "$%d\r\n%s\r\n", len(info), info)
			case "HELLO", "CLIENT":
				fmt.Fprint(conn, "-ERR unknown command\r\n")
			}
		}
	})
}

func serve(t *testing.T, handle func(net.Conn)) string {
	l := listen(t, 0)
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				handle(conn)
			}()
		}
	}()
	return l.Addr().String()
}

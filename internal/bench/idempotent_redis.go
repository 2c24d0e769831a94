package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"sync/atomic"
	"time"

	"github.com/gofiber/fiber/v3"
	fiberidempotency "github.com/gofiber/fiber/v3/middleware/idempotency"
	"github.com/redis/go-redis/v9"

	"github.com/ashlar-go/ashlar/idempotency"
	"github.com/ashlar-go/ashlar/idempotency/idempotencyredis"
)

// Requests through the HTTP middlewares on one Redis.
var idempotentRedisExperiment = experiment{
	ids:  []string{"I2", "I3"},
	what: "HTTP requests with the key's record in Redis at 16 clients",
	round: func(ctx context.Context, e *env, r *results) error {
		opts, err := redis.ParseURL(os.Getenv("TEST_REDIS_URL"))
		if err != nil {
			return err
		}
		client := redis.NewClient(opts)
		defer func() { _ = client.Close() }()
		trips := &tripHook{}
		client.AddHook(trips)
		store := idempotencyredis.New(client, &idempotencyredis.Options{Prefix: fmt.Sprintf("bench:%d:%d:", os.Getpid(), time.Now().UnixNano())})
		memory := idempotency.NewCache(store, nil)
		plain, cached := oursHandler(store), oursHandler(memory)
		peer := fiberApp(client)

		// The scripts are known to the server from the second call on.
		if err := serve(plain, "warm-1"); err != nil {
			return err
		}
		count := func(f func() error) (float64, error) {
			before := trips.n.Load()
			err := f()
			return float64(trips.n.Load() - before), err
		}
		first, err := count(func() error { return serve(plain, "trips") })
		if err != nil {
			return err
		}
		replay, err := count(func() error { return serve(plain, "trips") })
		if err != nil {
			return err
		}
		r.set("first trips", first)
		r.set("replay trips", replay)
		if err := sameBytes(plain, cached); err != nil {
			return err
		}

		if _, _, err := idempotency.Do(ctx, memory, replayKey, nil, func(context.Context) ([]byte, error) { return requestResult, nil }); err != nil {
			return err
		}
		d := 500 * time.Millisecond
		var serial atomic.Int64
		total := make(map[string]float64)
		turns := 4
		if e.quick {
			turns = 2
		}
		for range turns {
			for name, request := range map[string]func(i int) error{
				"first":  func(int) error { return serve(plain, fmt.Sprint("f", serial.Add(1))) },
				"fiber":  func(int) error { return fiberRequest(peer, fmt.Sprintf("%036d", serial.Add(1))) },
				"replay": func(int) error { return replayed(ctx, store) },
				"memory": func(int) error { return replayed(ctx, memory) },
			} {
				n, err := clients(ctx, 16, d, request)
				if err != nil {
					return fmt.Errorf("%s: %w", name, err)
				}
				total[name] += float64(n)
			}
		}
		for name, n := range total {
			r.set(name, n)
		}
		return nil
	},
	bars: []bar{
		{id: "I2", what: "round trips of a first execution", atMost: 2, unit: " ", ratio: func(r *results) float64 { return r.values["first trips"] }},
		{id: "I2", what: "round trips of a replay", atMost: 1, unit: " ", ratio: func(r *results) float64 { return r.values["replay trips"] }},
		{id: "I2", what: "first execution/fiber's", atLeast: 1.5, ratio: func(r *results) float64 { return r.of("first", "fiber") }},
		{id: "I3", what: "replay from memory/from Redis, byte-identical", atLeast: 10, ratio: func(r *results) float64 { return r.of("memory", "replay") }},
	},
}

// A tripHook counts round trips.
type tripHook struct{ n atomic.Int64 }

func (h *tripHook) DialHook(next redis.DialHook) redis.DialHook {
	return func(ctx context.Context, network, addr string) (net.Conn, error) { return next(ctx, network, addr) }
}

func (h *tripHook) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error { h.n.Add(1); return next(ctx, cmd) }
}

func (h *tripHook) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return func(ctx context.Context, cmds []redis.Cmder) error { h.n.Add(1); return next(ctx, cmds) }
}

func oursHandler(store idempotency.Store) http.Handler {
	return idempotency.Middleware(store, func(*http.Request) string { return "tenant" }, nil)(
		http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(http.StatusCreated)
			_, _ = w.Write(requestResult) // a recorder takes it all
		}),
	)
}

const requestBody = `{"amount":1999,"currency":"EUR"}`

func request(h http.Handler, key string) *httptest.ResponseRecorder {
	req := httptest.NewRequest(http.MethodPost, "/payments", bytes.NewReader([]byte(requestBody)))
	req.Header.Set("Idempotency-Key", key)
	w := httptest.NewRecorder()
	h.ServeHTTP(w, req)
	return w
}

func serve(h http.Handler, key string) error {
	if w := request(h, key); w.Code != http.StatusCreated {
		return fmt.Errorf("status %d: %s", w.Code, w.Body)
	}
	return nil
}

var replayKey = idempotency.Key{Scope: "tenant", ID: "replay", Fingerprint: []byte("fingerprint")}

// replayed asks for a result that is recorded.
func replayed(ctx context.Context, store idempotency.Store) error {
	v, again, err := idempotency.Do(ctx, store, replayKey, nil, func(context.Context) ([]byte, error) { return nil, errors.New("ran again") })
	if err == nil && (!again || !bytes.Equal(v, requestResult)) {
		err = fmt.Errorf("replayed %v: %s", again, v)
	}
	return err
}

// sameBytes checks that a replay from memory is the one from Redis.
func sameBytes(plain, cached http.Handler) error {
	_ = request(cached, "trips") // now it is in memory
	a, b := request(plain, "trips"), request(cached, "trips")
	if a.Code != b.Code || !bytes.Equal(a.Body.Bytes(), b.Body.Bytes()) || b.Header().Get("Idempotency-Replayed") != "true" ||
		fmt.Sprint(a.Header()) != fmt.Sprint(b.Header()) {
		return errors.New("the replay from memory differs from the one from Redis")
	}
	return nil
}

// fiberApp is fiber's middleware with its storage and its lock in Redis, which
// is what it takes to be safe with more than one process.
func fiberApp(client *redis.Client) *fiber.App {
	app := fiber.New()
	app.Use(fiberidempotency.New(fiberidempotency.Config{Storage: fiberStorage{client}, Lock: fiberLock{client}}))
	app.Post("/payments", func(c fiber.Ctx) error {
		c.Set("Content-Type", "application/json")
		return c.Status(http.StatusCreated).Send(requestResult)
	})
	return app
}

func fiberRequest(app *fiber.App, key string) error {
	req := httptest.NewRequest(http.MethodPost, "/payments", bytes.NewReader([]byte(requestBody)))
	req.Header.Set("X-Idempotency-Key", key)
	resp, err := app.Test(req, fiber.TestConfig{Timeout: 0})
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if _, err := io.Copy(io.Discard, resp.Body); err != nil {
		return err
	}
	if resp.StatusCode != http.StatusCreated {
		return fmt.Errorf("fiber: status %d", resp.StatusCode)
	}
	return nil
}

type fiberStorage struct{ client *redis.Client }

func (s fiberStorage) GetWithContext(ctx context.Context, key string) ([]byte, error) {
	b, err := s.client.Get(ctx, "bench:fiber:"+key).Bytes()
	if errors.Is(err, redis.Nil) {
		return nil, nil
	}
	return b, err
}

func (s fiberStorage) SetWithContext(ctx context.Context, key string, val []byte, exp time.Duration) error {
	return s.client.Set(ctx, "bench:fiber:"+key, val, exp).Err()
}

func (s fiberStorage) DeleteWithContext(ctx context.Context, key string) error {
	return s.client.Del(ctx, "bench:fiber:"+key).Err()
}
func (s fiberStorage) ResetWithContext(context.Context) error { return nil }
func (s fiberStorage) Get(key string) ([]byte, error) {
	return s.GetWithContext(context.Background(), key)
}

func (s fiberStorage) Set(key string, val []byte, exp time.Duration) error {
	return s.SetWithContext(context.Background(), key, val, exp)
}

func (s fiberStorage) Delete(key string) error { return s.DeleteWithContext(context.Background(), key) }
func (s fiberStorage) Reset() error            { return nil }
func (s fiberStorage) Close() error            { return nil }

type fiberLock struct{ client *redis.Client }

func (l fiberLock) Lock(key string) error {
	for {
		ok, err := l.client.SetNX(context.Background(), "bench:lock:"+key, 1, 30*time.Second).Result()
		if ok || err != nil {
			return err
		}
		time.Sleep(time.Millisecond)
	}
}

func (l fiberLock) Unlock(key string) error {
	return l.client.Del(context.Background(), "bench:lock:"+key).Err()
}

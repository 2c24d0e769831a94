package lockredis

import (
	"context"
	"errors"
	"net"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/ashlar-go/ashlar/internal/backoff"
	"github.com/ashlar-go/ashlar/lock/internal/wake"
)

// idle is for how long a subscription is kept when nobody waits any more.
const idle = 3 * time.Second

// A listener has a connection with a subscription for each key that is waited
// for, which is told of in a channel of the key's name.
type listener struct {
	client redis.UniversalClient
	hub    wake.Hub // by channel

	mu      sync.Mutex
	pubsub  *redis.PubSub
	hearing map[string]bool // subscribed channels; true once confirmed
}

// Watch implements [lock.Watcher].
func (s *Store) Watch(ctx context.Context, keys []string, wake func()) (stop func()) {
	counter, err := s.counter(keys)
	if err != nil {
		return func() {}
	}
	l := &s.listener
	channels := make([]string, len(keys))
	for i, key := range keys {
		channels[i] = nameOf(counter, key)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	stop = l.hub.Add(channels, wake)
	begin := l.pubsub == nil
	if begin {
		l.pubsub = l.client.Subscribe(context.WithoutCancel(ctx)) // dials with the first channel
		l.hearing = make(map[string]bool)
	}
	var missing []string
	for _, channel := range channels {
		if _, ok := l.hearing[channel]; !ok {
			l.hearing[channel] = false
			missing = append(missing, channel)
		}
		if l.hearing[channel] {
			wake()
		}
	}
	if len(missing) > 0 {
		// What fails is repeated with the next connection, after an error of receive.
		_ = l.pubsub.Subscribe(ctx, missing...)
	}
	if begin {
		go l.run(context.WithoutCancel(ctx), l.pubsub)
	}
	return stop
}

// run receives until nobody has waited for a while.
func (l *listener) run(ctx context.Context, pubsub *redis.PubSub) {
	defer func() { _ = pubsub.Close() }()
	swept := time.Now()
	for attempt := 0; ; {
		msg, err := pubsub.ReceiveTimeout(ctx, idle)
		var timeout net.Error
		switch {
		case err == nil:
			attempt = 0
			l.handle(msg)
		case errors.As(err, &timeout) && timeout.Timeout():
			_ = pubsub.Ping(ctx) // a dead connection shows itself
		default:
			l.deaf()
			_ = backoff.Sleep(ctx, backoff.Policy{Max: idle}.Next(attempt))
			attempt++
		}
		if time.Since(swept) >= idle {
			swept = time.Now()
			if l.over(ctx) {
				return
			}
		}
	}
}

func (l *listener) handle(msg any) {
	switch m := msg.(type) {
	case *redis.Message:
		l.hub.Wake(m.Channel)
	case *redis.Subscription:
		if m.Kind != "subscribe" {
			return
		}
		l.mu.Lock()
		if _, ok := l.hearing[m.Channel]; ok {
			l.hearing[m.Channel] = true
		}
		l.mu.Unlock()
		l.hub.Wake(m.Channel) // for what was told before
	}
}

// deaf notes that the connection is gone. The next one begins with the same
// subscriptions.
func (l *listener) deaf() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for channel := range l.hearing {
		l.hearing[channel] = false
	}
}

// over drops the subscriptions that nobody needs, and reports whether none is left.
func (l *listener) over(ctx context.Context) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	var unused []string
	for channel := range l.hearing {
		if !l.hub.Waited(channel) {
			unused = append(unused, channel)
			delete(l.hearing, channel)
		}
	}
	if len(l.hearing) == 0 {
		l.pubsub = nil
		return true
	}
	if len(unused) > 0 {
		_ = l.pubsub.Unsubscribe(ctx, unused...)
	}
	return false
}

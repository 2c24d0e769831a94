// Package lockredis keeps leases in Redis: fast, and with a fencing token at no
// cost, but not safe by themselves.
//
// # What a lease in Redis cannot promise
//
// That its holder is the only one. Redis acknowledges a write before it is on a
// disk or on a replica: after a failover, or a restart without appendfsync
// always, a lease that was granted may be gone, and another is granted while the
// first holder works on. An eviction policy other than noeviction or one of the
// volatile ones loses counters and leases likewise, and tokens may then be lower
// than ones before. More than one server asked for a majority, as in Redlock,
// makes this rarer and promises no more, for it rests on clocks and pauses.
//
// So use these leases to avoid work that is done twice, where that is a waste. If
// it is a loss, use lockpg with its Guard; or hand the token to whatever is
// written to, and have it refuse one that is lower than one it has seen
// (lockpg.Fence), which bounds the damage to what came before.
package lockredis

import (
	"context"
	"crypto/sha1"
	_ "embed"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"
	"strconv"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/ashlar-go/ashlar/lock"
)

// Options tunes a [Store]. The zero value of each field means its default.
type Options struct {
	// Prefix begins the name of every key and channel. No braces. Default "lock:".
	Prefix string
}

// A Store is a [lock.Store] in Redis 6.2 or newer, also in a Redis Cluster.
// Acquire and Release cost one round trip each; a server that does not know the
// scripts yet, as after a restart, is sent them once more. The clock that decides
// is the server's.
//
// Keys of one lease must have a hash tag in common, such as the {42} of
// "{42}:stock" and "{42}:price"; Acquire refuses others, also where there is no
// cluster. Keys end with their lease. The tokens come from 256 counters, which are
// all that stays; see the package on what they are worth.
//
// It is safe for concurrent use.
type Store struct {
	client   redis.UniversalClient
	prefix   string
	counters [256]any // names
	listener listener
}

var (
	_ lock.Store   = (*Store)(nil)
	_ lock.Watcher = (*Store)(nil)
)

// A script is sent by its digest. The parts of the command are boxed once.
type script struct{ source, digest any }

func newScript(source string) script {
	digest := sha1.Sum([]byte(source))
	return script{source, hex.EncodeToString(digest[:])}
}

var (
	//go:embed acquire.lua
	acquireSource string
	//go:embed extend.lua
	extendSource string
	//go:embed release.lua
	releaseSource string

	acquireScript = newScript(acquireSource)
	extendScript  = newScript(extendSource)
	releaseScript = newScript(releaseSource)
)

// New returns a store on client, such as a *redis.Client or a
// *redis.ClusterClient, which stays the caller's. opts may be nil.
//
// A client that repeats commands whose reply it lost, as go-redis does by default,
// is welcome: each is safe to repeat.
func New(client redis.UniversalClient, opts *Options) *Store {
	if client == nil {
		panic("lockredis: New needs a client")
	}
	s := &Store{client: client, prefix: "lock:"}
	if opts != nil && opts.Prefix != "" {
		s.prefix = opts.Prefix
	}
	if strings.ContainsAny(s.prefix, "{}") {
		panic("lockredis: the prefix must have no braces")
	}
	for i := range s.counters {
		s.counters[i] = s.prefix + "{" + strconv.Itoa(i) + "}"
	}
	s.listener.client = client
	return s
}

// tag is the part of a key that decides on its slot, as Redis Cluster has it.
func tag(key string) (tag string, explicit bool) {
	if _, rest, ok := strings.Cut(key, "{"); ok {
		if inner, _, ok := strings.Cut(rest, "}"); ok && inner != "" {
			return inner, true
		}
	}
	return key, false
}

// counter returns the name of the counter in the slot of keys.
func (s *Store) counter(keys []string) (any, error) {
	first, _ := tag(keys[0])
	for _, key := range keys[1:] {
		if other, explicit := tag(key); !explicit || other != first {
			return nil, fmt.Errorf("%w: the keys of one lease must have a hash tag in common, unlike %q and %q", lock.ErrInvalid, keys[0], key)
		}
	}
	return s.counters[crc32.ChecksumIEEE([]byte(first))%uint32(len(s.counters))], nil
}

func nameOf(counter any, key string) string { return counter.(string) + ":" + key }

// run runs a script on the counter and the keys.
func (s *Store) run(ctx context.Context, script script, req lock.Request, waiting any) (any, error) {
	if err := req.Validate(); err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	counter, err := s.counter(req.Keys)
	if err != nil {
		return nil, err
	}
	c, _ := calls.Get().(*call)
	words := c.fill(script, counter, req, waiting)
	cmd := redis.NewCmd(ctx, words...)
	if err = s.client.Process(ctx, cmd); isUnknown(err) {
		words[0], words[1] = "eval", script.source
		cmd = redis.NewCmd(ctx, words...)
		err = s.client.Process(ctx, cmd)
	}
	if err == nil { // otherwise a client may still be about to send it
		calls.Put(c)
	}
	return cmd.Val(), err
}

// isUnknown reports whether the server does not have the script. Some that are
// not quite Redis say so in the middle of their error.
func isUnknown(err error) bool {
	return err != nil && strings.Contains(err.Error(), "NOSCRIPT")
}

var yes, no any = "1", ""

// Acquire implements [lock.Store].
func (s *Store) Acquire(ctx context.Context, req lock.Request) (int64, error) {
	waiting := no
	if req.Waiting {
		waiting = yes
	}
	reply, err := s.run(ctx, acquireScript, req, waiting)
	if err != nil {
		return 0, wrap("acquire", err)
	}
	switch v := reply.(type) {
	case int64:
		return v, nil
	case []any:
		if len(v) == 2 {
			i, _ := v[0].(int64)
			ms, _ := v[1].(int64)
			if i >= 1 && int(i) <= len(req.Keys) {
				return 0, &lock.HeldError{Key: req.Keys[i-1], RetryAfter: time.Duration(max(ms, 0)+1) * time.Millisecond}
			}
		}
	}
	return 0, wrap("acquire", fmt.Errorf("unexpected reply %v", reply))
}

// Extend implements [lock.Store].
func (s *Store) Extend(ctx context.Context, req lock.Request) error {
	return s.update(ctx, "extend", extendScript, req)
}

// Release implements [lock.Store].
func (s *Store) Release(ctx context.Context, req lock.Request) error {
	return s.update(ctx, "release", releaseScript, req)
}

func (s *Store) update(ctx context.Context, op string, script script, req lock.Request) error {
	reply, err := s.run(ctx, script, req, no)
	if err == nil && reply != int64(1) {
		err = lock.ErrLost
	}
	return wrap(op, err)
}

func wrap(op string, err error) error {
	if err == nil {
		return nil
	}
	if errors.Is(err, redis.Nil) {
		err = errors.New("empty reply")
	}
	return fmt.Errorf("lockredis: %s: %w", op, err)
}

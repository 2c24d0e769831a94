package lockredis

import (
	"strconv"
	"sync"
	"time"

	"github.com/ashlar-go/ashlar/lock"
)

// A call has the words of a command. They are used again, for to box each of them
// anew is half of what a command allocates. The first key decides on the slot and
// must be a plain string: it is the counter.
type call struct {
	all   []any
	words []*word
}

var calls = sync.Pool{New: func() any { return new(call) }}

// A word is sent as its bytes.
type word struct{ b []byte }

// MarshalBinary is how the client asks for them.
func (w *word) MarshalBinary() ([]byte, error) { return w.b, nil }

// String is what a tracer shows.
func (w *word) String() string { return string(w.b) }

// fill returns the words of a script's command.
func (c *call) fill(script script, counter any, req lock.Request, waiting any) []any {
	for len(c.words) < len(req.Keys)+2 {
		c.words = append(c.words, new(word))
	}
	c.all = append(c.all[:0], "evalsha", script.digest, 1+len(req.Keys), counter)
	for i, key := range req.Keys {
		w := c.words[i]
		w.b = append(append(append(w.b[:0], counter.(string)...), ':'), key...)
		c.all = append(c.all, w)
	}
	owner, ttl := c.words[len(req.Keys)], c.words[len(req.Keys)+1]
	owner.b = append(owner.b[:0], req.Owner...)
	// Rounded up, so that no lease ends early.
	ttl.b = strconv.AppendInt(ttl.b[:0], int64((req.TTL+time.Millisecond-1)/time.Millisecond), 10)
	c.all = append(c.all, owner, ttl, waiting)
	return c.all
}

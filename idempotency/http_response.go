package idempotency

import (
	"encoding/binary"
	"errors"
	"maps"
	"net/http"
	"slices"
)

// A response is the recorded form of one.
type response struct {
	status  int
	dropped bool // sent, but not kept
	header  http.Header
	body    []byte
}

func (r *response) write(w http.ResponseWriter) {
	maps.Copy(w.Header(), r.header)
	w.WriteHeader(r.status)
	if len(r.body) > 0 {
		_, _ = w.Write(r.body) // the client may have gone
	}
}

const (
	formatKept    = 1
	formatDropped = 2
)

var errFormat = errors.New("idempotency: the record is not a response")

// encodeResponse writes a byte for the format, the status, the headers with
// their number and lengths in front, as unsigned varints, and the body.
func encodeResponse(r *response) []byte {
	format := byte(formatKept)
	if r.dropped {
		format = formatDropped
	}
	b := binary.AppendUvarint([]byte{format}, uint64(r.status))
	var fields []string
	for _, name := range slices.Sorted(maps.Keys(r.header)) {
		for _, value := range r.header[name] {
			fields = append(fields, name, value)
		}
	}
	b = binary.AppendUvarint(b, uint64(len(fields)))
	for _, f := range fields {
		b = binary.AppendUvarint(b, uint64(len(f)))
		b = append(b, f...)
	}
	return append(b, r.body...)
}

func decodeResponse(b []byte) (*response, error) {
	if len(b) == 0 || b[0] != formatKept && b[0] != formatDropped {
		return nil, errFormat
	}
	r := &response{dropped: b[0] == formatDropped, header: make(http.Header)}
	b = b[1:]
	number := func(limit uint64) (int, bool) {
		v, n := binary.Uvarint(b)
		if n <= 0 || v > limit {
			return 0, false
		}
		b = b[n:]
		return int(v), true
	}
	status, ok := number(999)
	if !ok || status < 100 {
		return nil, errFormat
	}
	r.status = status
	count, ok := number(uint64(len(b)))
	if !ok || count%2 != 0 {
		return nil, errFormat
	}
	var name string
	for i := range count {
		size, ok := number(uint64(len(b)))
		if !ok || size > len(b) {
			return nil, errFormat
		}
		if f := string(b[:size]); i%2 == 0 {
			name = f
		} else {
			r.header[name] = append(r.header[name], f)
		}
		b = b[size:]
	}
	r.body = b
	return r, nil
}

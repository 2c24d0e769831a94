// Package ids makes identifiers: time-ordered UUIDs (RFC 9562, version 7).
package ids

import (
	"crypto/rand"
	"encoding/hex"
	"time"
)

// New returns a UUIDv7 in its canonical form of 36 characters: 48 bits of Unix
// milliseconds, then 74 random bits. It is safe for concurrent use.
func New() string {
	var b [16]byte
	rand.Read(b[:]) // never fails since Go 1.24: it aborts the program instead
	ms := uint64(time.Now().UnixMilli())
	b[0], b[1], b[2] = byte(ms>>40), byte(ms>>32), byte(ms>>24)
	b[3], b[4], b[5] = byte(ms>>16), byte(ms>>8), byte(ms)
	b[6] = b[6]&0x0f | 0x70
	b[8] = b[8]&0x3f | 0x80
	var s [36]byte
	hex.Encode(s[0:8], b[0:4])
	hex.Encode(s[9:13], b[4:6])
	hex.Encode(s[14:18], b[6:8])
	hex.Encode(s[19:23], b[8:10])
	hex.Encode(s[24:36], b[10:16])
	s[8], s[13], s[18], s[23] = '-', '-', '-', '-'
	return string(s[:])
}

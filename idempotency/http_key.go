package idempotency

import (
	"fmt"
	"strings"
)

// ParseKey returns the ID that the value of an Idempotency-Key header carries:
// a quoted string (RFC 8941, section 3.3.3; draft-ietf-httpapi-idempotency-key-header),
// or the same characters bare, without space, quotation mark, backslash, comma
// and semicolon. Quoted or bare, equal characters are the same ID.
//
// The error wraps [ErrInvalid] if the ID is empty, longer than 255 bytes or not
// of printable ASCII, or if parameters or a second value follow it.
func ParseKey(header string) (string, error) {
	s := strings.Trim(header, " \t")
	id, err := s, error(nil)
	if strings.HasPrefix(s, `"`) {
		id, err = unquote(s)
	} else if i := strings.IndexFunc(s, isNotBare); i >= 0 {
		err = fmt.Errorf("%w: the character %q at %d", ErrInvalid, s[i], i)
	}
	switch {
	case err != nil:
		return "", err
	case id == "":
		return "", fmt.Errorf("%w: it is empty", ErrInvalid)
	case len(id) > 255:
		return "", fmt.Errorf("%w: %d bytes, the limit is 255", ErrInvalid, len(id))
	}
	return id, nil
}

func isNotBare(r rune) bool { return r <= ' ' || r > '~' || strings.ContainsRune(`"\,;`, r) }

// unquote parses an sf-string, the whole of s.
func unquote(s string) (string, error) {
	var id strings.Builder
	for i := 1; i < len(s); i++ {
		switch c := s[i]; {
		case c == '"':
			if i != len(s)-1 {
				return "", fmt.Errorf("%w: more follows the closing quotation mark", ErrInvalid)
			}
			return id.String(), nil
		case c == '\\':
			i++
			if i == len(s) || s[i] != '"' && s[i] != '\\' {
				return "", fmt.Errorf("%w: a backslash escapes neither a quotation mark nor a backslash", ErrInvalid)
			}
			id.WriteByte(s[i])
		case c < ' ' || c > '~':
			return "", fmt.Errorf("%w: the character %q at %d", ErrInvalid, c, i)
		default:
			id.WriteByte(c)
		}
	}
	return "", fmt.Errorf("%w: no closing quotation mark", ErrInvalid)
}

package payment

import (
	"regexp"
	"unicode"
)

// A version 1 to 8 UUID: its digits say nothing, although some of them look like
// a card number.
var uuidPattern = regexp.MustCompile(`\b[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[1-8][0-9a-fA-F]{3}-[89abAB][0-9a-fA-F]{3}-[0-9a-fA-F]{12}\b`)

// HasCardNumber reports whether s contains what may be a card number: 13 to 19
// digits with a valid check digit (ISO/IEC 7812), which may be separated by
// spaces, dashes, dots or underscores. In longer runs of digits every part is
// looked at. Canonical UUIDs, also within a longer text, are left out.
//
// One in ten numbers of that length is taken for a card number by chance. That
// is the side to err on: such a number is refused, not stored.
func HasCardNumber(s string) bool {
	if len(s) >= 36 {
		s = uuidPattern.ReplaceAllLiteralString(s, "u")
	}
	run := make([]byte, 0, 32)
	separators := 0
	for _, r := range s {
		switch {
		case unicode.IsDigit(r):
			run = append(run, digitValue(r))
			separators = 0
		case len(run) > 0 && separators < 3 && isSeparator(r):
			separators++
		default:
			if runHasCard(run) {
				return true
			}
			run, separators = run[:0], 0
		}
	}
	return runHasCard(run)
}

func isSeparator(r rune) bool {
	return r == '_' || r == '.' || unicode.IsSpace(r) || unicode.Is(unicode.Pd, r)
}

// digitValue is that of a decimal digit of any script: each has its ten in order,
// beginning at a multiple of the block that unicode.Nd lists.
func digitValue(r rune) byte {
	if r <= '9' {
		return byte(r - '0')
	}
	for _, t := range unicode.Nd.R16 {
		if uint16(r) >= t.Lo && uint16(r) <= t.Hi && r <= 0xffff {
			return byte((uint16(r) - t.Lo) % 10)
		}
	}
	for _, t := range unicode.Nd.R32 {
		if uint32(r) >= t.Lo && uint32(r) <= t.Hi {
			return byte((uint32(r) - t.Lo) % 10)
		}
	}
	return 0
}

func runHasCard(run []byte) bool {
	if len(run) <= 19 {
		return len(run) >= 13 && luhn(run)
	}
	for n := 13; n <= 19; n++ {
		for i := 0; i+n <= len(run); i++ {
			if luhn(run[i : i+n]) {
				return true
			}
		}
	}
	return false
}

// luhn checks the last digit by the algorithm of Hans Peter Luhn, US patent
// 2950048 (1960). A run of nothing but zeros is no number.
func luhn(digits []byte) bool {
	sum, zero := 0, true
	for i := range digits {
		d := int(digits[len(digits)-1-i])
		zero = zero && d == 0
		if i%2 == 1 {
			if d *= 2; d > 9 {
				d -= 9
			}
		}
		sum += d
	}
	return sum%10 == 0 && !zero
}

package schedule

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

func at(t *testing.T, s string) time.Time {
	t.Helper()
	at, err := time.Parse(time.RFC3339Nano, s)
	if err != nil {
		t.Fatal(err)
	}
	return at
}

// The ticks around changes of clocks, in UTC.
func TestChangesOfClocks(t *testing.T) {
	for _, test := range []struct {
		spec, zone, after string
		want              []string
	}{
		// Berlin goes from 2:00 to 3:00 on 29 March 2026 and from 3:00 to 2:00 on 25
		// October, both at 1:00 UTC.
		{"30 2 * * *", "Europe/Berlin", "2026-03-28T01:00:00Z", []string{"2026-03-28T01:30:00Z", "2026-03-29T01:00:00Z", "2026-03-30T00:30:00Z"}},
		{"0,30 2 * * *", "Europe/Berlin", "2026-03-28T02:00:00Z", []string{"2026-03-29T01:00:00Z", "2026-03-30T00:00:00Z"}},
		{"0 2,3 * * *", "Europe/Berlin", "2026-03-28T02:30:00Z", []string{"2026-03-29T01:00:00Z", "2026-03-30T00:00:00Z", "2026-03-30T01:00:00Z"}},
		{"0 3 * * *", "Europe/Berlin", "2026-03-28T02:30:00Z", []string{"2026-03-29T01:00:00Z", "2026-03-30T01:00:00Z"}},
		{"*/30 * * * *", "Europe/Berlin", "2026-03-29T00:00:00Z", []string{"2026-03-29T00:30:00Z", "2026-03-29T01:00:00Z", "2026-03-29T01:30:00Z"}},
		{"30 * * * *", "Europe/Berlin", "2026-03-29T00:00:00Z", []string{"2026-03-29T00:30:00Z", "2026-03-29T01:30:00Z"}},
		{"0 */2 * * *", "Europe/Berlin", "2026-03-28T22:00:00Z", []string{"2026-03-28T23:00:00Z", "2026-03-29T01:00:00Z", "2026-03-29T02:00:00Z"}},
		{"30 2 * * *", "Europe/Berlin", "2026-10-24T00:30:00Z", []string{"2026-10-25T00:30:00Z", "2026-10-26T01:30:00Z"}},
		{"30 2 * * *", "Europe/Berlin", "2026-10-25T01:10:00Z", []string{"2026-10-26T01:30:00Z"}},
		{"0 3 * * *", "Europe/Berlin", "2026-10-24T12:00:00Z", []string{"2026-10-25T02:00:00Z", "2026-10-26T02:00:00Z"}},
		{"*/30 * * * *", "Europe/Berlin", "2026-10-24T23:40:00Z", []string{"2026-10-25T00:00:00Z", "2026-10-25T00:30:00Z", "2026-10-25T01:00:00Z", "2026-10-25T01:30:00Z", "2026-10-25T02:00:00Z"}},
		{"0 */2 * * *", "Europe/Berlin", "2026-10-24T21:00:00Z", []string{"2026-10-24T22:00:00Z", "2026-10-25T00:00:00Z", "2026-10-25T03:00:00Z"}},
		{"@daily", "Europe/Berlin", "2026-10-24T12:00:00Z", []string{"2026-10-24T22:00:00Z", "2026-10-25T23:00:00Z"}},
		{"@hourly", "America/New_York", "2026-11-01T04:30:00Z", []string{"2026-11-01T05:00:00Z", "2026-11-01T06:00:00Z", "2026-11-01T07:00:00Z"}},
		{"30 1 * * SUN", "America/New_York", "2026-10-27T00:00:00Z", []string{"2026-11-01T05:30:00Z", "2026-11-08T06:30:00Z"}},
		{"30 2 8 3 *", "America/New_York", "2026-01-01T00:00:00Z", []string{"2026-03-08T07:00:00Z", "2027-03-08T07:30:00Z"}},
		// São Paulo skipped midnight.
		{"0 0 * * *", "America/Sao_Paulo", "2018-11-03T12:00:00Z", []string{"2018-11-04T03:00:00Z", "2018-11-05T02:00:00Z"}},
		// Lord Howe Island changes by half an hour, Samoa once skipped a day.
		{"15 2 * * *", "Australia/Lord_Howe", "2026-10-03T00:00:00Z", []string{"2026-10-03T15:30:00Z", "2026-10-04T15:15:00Z"}},
		{"45 1 * * *", "Australia/Lord_Howe", "2026-04-04T00:00:00Z", []string{"2026-04-04T14:45:00Z", "2026-04-05T15:15:00Z"}},
		{"0 12 * * *", "Pacific/Apia", "2011-12-29T12:00:00Z", []string{"2011-12-29T22:00:00Z", "2011-12-30T10:00:00Z", "2011-12-30T22:00:00Z"}},
		{"30 9 * * *", "Asia/Kolkata", "2026-01-01T00:00:00Z", []string{"2026-01-01T04:00:00Z", "2026-01-02T04:00:00Z"}},
	} {
		timing, err := Parse(test.spec, test.zone)
		if err != nil {
			t.Fatal(err)
		}
		tick := at(t, test.after)
		for i, want := range test.want {
			if tick = timing.Next(tick); !tick.Equal(at(t, want)) {
				t.Errorf("%s in %s: tick %d after %s is %s, want %s", test.spec, test.zone, i+1, test.after, tick.Format(time.RFC3339), want)
				break
			}
		}
	}
}

// What Next says, compared with a look at every minute of the days around
// changes: a clock's reading counts once, a skipped one at the change.
func TestNextAgainstEveryMinute(t *testing.T) {
	for zone, days := range map[string][]string{
		"Europe/Berlin":       {"2026-03-28T00:00:00Z", "2026-10-24T00:00:00Z"},
		"America/New_York":    {"2026-03-07T00:00:00Z", "2026-10-31T00:00:00Z"},
		"Australia/Lord_Howe": {"2026-04-04T00:00:00Z", "2026-10-03T00:00:00Z"},
		"America/Sao_Paulo":   {"2018-11-03T00:00:00Z", "2018-02-17T00:00:00Z"},
		"Pacific/Apia":        {"2011-12-29T00:00:00Z"},
		"Asia/Kathmandu":      {"2026-01-01T00:00:00Z"},
		"UTC":                 {"2026-03-28T00:00:00Z"},
	} {
		for _, day := range days {
			for _, spec := range []string{
				"* * * * *", "*/7 * * * *", "0 0 * * *", "30 2 * * *", "*/20 1-3 * * *", "59 23 * * *", "0 */2 * * *", "15 * * * *",
				"0 0,12 * * SUN", "30 1 25,28,29,31 * *", "0-59/13 0-22 * * *",
			} {
				start := at(t, day)
				end := start.Add(72 * time.Hour)
				timing, err := Parse(spec, zone)
				if err != nil {
					t.Fatal(err)
				}
				var got []time.Time
				for tick := timing.Next(start); tick.Before(end); tick = timing.Next(tick) {
					got = append(got, tick)
				}
				if want := everyMinute(timing.(*calendar), start, end); !slices.EqualFunc(got, want, time.Time.Equal) {
					t.Errorf("%s in %s from %s: %d ticks, want %d\n got %v\nwant %v", spec, zone, day, len(got), len(want), got, want)
				}
			}
		}
	}
}

func everyMinute(c *calendar, start, end time.Time) (ticks []time.Time) {
	matches := func(shown time.Time) bool { return c.fields.Next(shown.Add(-time.Second)).Equal(shown) }
	wallAt := func(t time.Time) time.Time { t = t.In(c.loc); return wall(t, offsetAt(t)) }
	highest := wallAt(start.Add(-48 * time.Hour))
	for m := start.Add(-48 * time.Hour).Add(time.Minute); m.Before(end); m = m.Add(time.Minute) {
		shown, tick := wallAt(m), false
		if c.elapsed {
			tick = matches(shown)
		} else {
			for w := highest.Add(time.Minute); !w.After(shown); w = w.Add(time.Minute) {
				tick = tick || matches(w)
			}
		}
		if shown.After(highest) {
			highest = shown
		}
		if tick && m.After(start) {
			ticks = append(ticks, m)
		}
	}
	return ticks
}

func TestSpecs(t *testing.T) {
	for _, test := range []struct{ spec, after, want string }{
		{"every 90s", "2026-01-01T00:00:00Z", "2026-01-01T00:01:30Z"},
		{"every 90s", "2026-01-01T00:01:29.999999Z", "2026-01-01T00:01:30Z"},
		{" every  24h ", "2026-05-05T17:00:00Z", "2026-05-06T00:00:00Z"},
		{"every 10ms", "2026-01-01T00:00:00.011Z", "2026-01-01T00:00:00.02Z"},
		{"every 1h", "1969-12-31T22:30:00Z", "1969-12-31T23:00:00Z"},
		{"every 1h", "2262-06-01T00:30:00Z", "2262-06-01T01:00:00Z"},
		{"*/10 30 4 * * *", "2026-01-01T04:30:41Z", "2026-01-01T04:30:50Z"},
		{"@weekly", "2026-11-24T00:00:00Z", "2026-11-29T00:00:00Z"},
		{"0 0 29 2 *", "2096-03-01T00:00:00Z", "2104-02-29T00:00:00Z"},
		{"0 0 13 * FRI", "2026-02-01T00:00:00Z", "2026-02-06T00:00:00Z"}, // POSIX: one of the two suffices
		{"0 0 L * *", "2026-02-01T00:00:00Z", "2026-02-28T00:00:00Z"},
		{"0 0 * * FRI#3", "2026-02-01T00:00:00Z", "2026-02-20T00:00:00Z"},
		{"0 22-2 * * *", "2026-02-01T03:00:00Z", "2026-02-01T22:00:00Z"},
	} {
		timing, err := Parse(test.spec, "")
		if err != nil {
			t.Errorf("%q: %v", test.spec, err)
			continue
		}
		if got := timing.Next(at(t, test.after)); !got.Equal(at(t, test.want)) {
			t.Errorf("%q after %s: %s, want %s", test.spec, test.after, got.Format(time.RFC3339Nano), test.want)
		}
	}
}

func TestSpecsThatAreRefused(t *testing.T) {
	for spec, says := range map[string]string{
		"":                           "",
		"* * * *":                    "fields",
		"60 * * * *":                 "60",
		"30 2 30 2 *":                "no tick in 41 years",
		"0 0 31 4,6,9,11 *":          "no tick",
		"@reboot":                    "@reboot",
		"@every 5m":                  `write "every 5m"`,
		"TZ=UTC 0 0 * * *":           "give the time zone in Zone",
		"CRON_TZ=":                   "give the time zone in Zone",
		"every":                      "duration",
		"every 0s":                   "interval",
		"every -1h":                  "interval",
		"every 1ms":                  "interval",
		"every 10000001ns":           "whole microseconds",
		"every 999999h":              "interval",
		"*/0 * * * *":                "",
		"1-2-3 * * * *":              "",
		"H * * * *":                  "",
		"0 0 * * *; DROP TABLE x":    "",
		strings.Repeat("1,", 100000): "",
	} {
		_, err := Parse(spec, "UTC")
		if !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), says) {
			t.Errorf("Parse(%.40q) = %v, want ErrInvalid that says %q", spec, err, says)
		}
	}
	for _, zone := range []string{"Local", "Mars/Olympus", "../UTC", "/etc/passwd", "UTC\x00"} {
		if _, err := Parse("@daily", zone); !errors.Is(err, ErrInvalid) {
			t.Errorf("Parse in %q = %v, want ErrInvalid", zone, err)
		}
	}
}

// Whatever is parsed has ticks, in order, and no search goes on for ever.
func FuzzParse(f *testing.F) {
	for _, spec := range []string{"*/5 * * * *", "0 0 29 2 FRI", "every 10ms", "@monthly", "30 2 30 2 *", "0 0 1W,L-3 * MON#2", "func x", "TZ=", "22-2/2 * * 1-12 SUN-SAT"} {
		f.Add(spec, int64(1_774_000_000))
	}
	zones := []string{"UTC", "Europe/Berlin", "Australia/Lord_Howe", "Pacific/Apia", "America/Sao_Paulo"}
	f.Fuzz(func(t *testing.T, spec string, unix int64) {
		zone := zones[uint64(unix)%uint64(len(zones))]
		timing, err := Parse(spec, zone)
		if err != nil {
			if !errors.Is(err, ErrInvalid) && !errors.Is(err, errFunc) {
				t.Errorf("Parse = %v", err)
			}
			return
		}
		if unix %= 4_000_000_000; unix < 0 {
			unix = -unix
		}
		from := time.Unix(unix, 0)
		for range 20 {
			tick := timing.Next(from)
			if tick.IsZero() {
				return
			}
			if !tick.After(from) {
				t.Fatalf("%q in %s: the tick after %v is %v", spec, zone, from, tick)
			}
			// From any moment before it, it is the same tick.
			if middle := from.Add(tick.Sub(from) / 2); !timing.Next(middle).Equal(tick) {
				t.Fatalf("%q in %s: %v after %v, but %v after %v", spec, zone, tick, from, timing.Next(middle), middle)
			}
			from = tick
		}
	})
}

func BenchmarkNext(b *testing.B) {
	for _, spec := range []string{"every 1s", "*/5 * * * *", "30 2 * * MON-FRI", "0 0 29 2 *"} {
		timing, err := Parse(spec, "Europe/Berlin")
		if err != nil {
			b.Fatal(err)
		}
		b.Run(fmt.Sprintf("%q", spec), func(b *testing.B) {
			from := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
			for b.Loop() {
				timing.Next(from)
			}
		})
	}
}

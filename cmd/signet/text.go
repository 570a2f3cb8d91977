package main

import (
	"io"
	"regexp"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"google.golang.org/protobuf/types/known/timestamppb"
	"k8s.io/apimachinery/pkg/util/duration"
)

// scrub makes what a terminal would act upon visible: control characters, invisible and direction-changing ones and
// bytes that are not UTF-8 become their Go escapes (\x1b, \n, \u202e). What remains is one line of printable text.
func scrub(s string) string {
	clean := true
	for _, r := range s {
		if !printable(r) {
			clean = false
			break
		}
	}
	if clean {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); {
		r, n := utf8.DecodeRuneInString(s[i:])
		if printable(r) {
			b.WriteRune(r)
		} else {
			q := strconv.QuoteToASCII(s[i : i+n])
			b.WriteString(q[1 : len(q)-1])
		}
		i += n
	}
	return b.String()
}

func printable(r rune) bool { return r != utf8.RuneError && unicode.IsPrint(r) }

// A pen colours words, or leaves them as they are. Colour only ever repeats what the word says.
type pen struct{ on bool }

// pen returns how to write to w: in colour on a terminal, unless NO_COLOR is set or TERM is dumb; CLICOLOR_FORCE is for
// pipes that end at a terminal. NO_COLOR is the stronger of the two.
func (a *app) pen(w io.Writer) pen {
	switch force := a.getenv("CLICOLOR_FORCE"); {
	case a.getenv("NO_COLOR") != "":
		return pen{}
	case force != "" && force != "0":
		return pen{on: true}
	case a.getenv("TERM") == "dumb" || a.getenv("CLICOLOR") == "0":
		return pen{}
	}
	return pen{on: a.tty(w)}
}

func (p pen) red(s string) string    { return p.paint("31", s) }
func (p pen) yellow(s string) string { return p.paint("33", s) }

func (p pen) paint(code, s string) string {
	if !p.on {
		return s
	}
	return "\x1b[" + code + "m" + s + "\x1b[0m"
}

// words paints the words of state in finished text, after columns have been aligned.
func (p pen) words(text []byte) []byte {
	if !p.on {
		return text
	}
	loud := regexp.MustCompile(`\b(ERROR|EXPIRED|NACK|FAILED|BAD|WARNING|OVERDUE|WAIT|UNKNOWN)\b`)
	return loud.ReplaceAllFunc(text, func(w []byte) []byte {
		switch string(w) {
		case "WARNING", "OVERDUE", "WAIT", "UNKNOWN":
			return []byte(p.yellow(string(w)))
		}
		return []byte(p.red(string(w)))
	})
}

// timeOf returns what ts says, and the zero time where it says nothing or nonsense.
func timeOf(ts *timestamppb.Timestamp) time.Time {
	if !ts.IsValid() {
		return time.Time{}
	}
	return ts.AsTime()
}

// stamp writes t as RFC 3339 in UTC, and nothing for no time.
func stamp(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format(time.RFC3339)
}

// until tells in how much time t comes, "41m", or how long ago it was, "EXPIRED 3m".
func until(t, now time.Time, past string) string {
	switch d := t.Sub(now); {
	case t.IsZero():
		return "-"
	case d > 0:
		return duration.HumanDuration(d)
	default:
		return past + " " + duration.HumanDuration(-d)
	}
}

// short abbreviates a serial number or key id: enough to tell a few hundred apart; -o wide has the whole.
func short(id string) string {
	if len(id) > 8 {
		return id[:8]
	}
	return dash(id)
}

// dash keeps a column in place where there is nothing to say.
func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

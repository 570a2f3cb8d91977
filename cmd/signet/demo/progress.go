package demo

import (
	"encoding/json"
	"fmt"
	"io"
	"sync"
	"time"
)

// progress prints one line for each thing that happened, with the time since the start. It is safe for concurrent use.
type progress struct {
	start time.Time
	json  bool

	mu sync.Mutex
	w  io.Writer
}

// say prints that something happened to, or was done by, who.
func (p *progress) say(who, format string, args ...any) {
	p.mu.Lock()
	defer p.mu.Unlock()
	ms, text := time.Since(p.start).Milliseconds(), fmt.Sprintf(format, args...)
	if !p.json {
		fmt.Fprintf(p.w, "%6d ms  %-12s %s\n", ms, who, text)
		return
	}
	line, err := json.Marshal(struct {
		Millis int64  `json:"millis"`
		Who    string `json:"who"`
		Text   string `json:"text"`
	}{ms, who, text})
	if err == nil { // strings and numbers always encode
		fmt.Fprintf(p.w, "%s\n", line)
	}
}

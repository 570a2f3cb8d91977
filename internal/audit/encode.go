package audit

import (
	"encoding/json"
	"strconv"
	"time"
)

// entryBytes is room for most entries.
const entryBytes = 1024

// appendEntry appends what json.Marshal makes of e, in half the time: each SVID waits for it. What is to be done for a member
// stands at its field of Entry; a test compares the two.
func appendEntry(to []byte, e *Entry) ([]byte, error) {
	m := members{to: append(to, '{')}
	m.time("time", e.Time)
	m.always("kind", string(e.Kind))
	m.text("correlationID", e.CorrelationID)
	m.text("spiffeID", e.SPIFFEID)
	m.text("cluster", e.Cluster)
	m.text("namespace", e.Namespace)
	m.text("serviceAccount", e.ServiceAccount)
	m.text("serviceAccountUID", e.ServiceAccountUID)
	m.text("pod", e.Pod)
	m.text("podUID", e.PodUID)
	m.text("node", e.Node)
	m.text("nodeUID", e.NodeUID)
	m.text("tokenID", e.TokenID)
	m.list("dnsNames", e.DNSNames)
	m.text("serial", e.Serial)
	if !e.NotAfter.IsZero() {
		m.time("notAfter", e.NotAfter)
	}
	m.text("issuer", e.Issuer)
	m.text("reason", e.Reason)
	m.text("detail", e.Detail)
	m.text("method", e.Method)
	m.text("caller", e.Caller)
	m.text("callerNode", e.CallerNode)
	m.text("callerNodeUID", e.CallerNodeUID)
	if e.Count != 0 {
		m.name("count")
		m.to = strconv.AppendUint(m.to, e.Count, 10)
	}
	if !e.Last.IsZero() {
		m.time("last", e.Last)
	}
	if e.Grace {
		m.name("grace")
		m.to = append(m.to, "true"...)
	}
	return append(m.to, '}'), m.err
}

// members are those of a JSON object that is written. What is empty is left out.
type members struct {
	to  []byte
	err error // of a time that JSON cannot say
}

// name begins a member.
func (m *members) name(name string) {
	if m.to[len(m.to)-1] != '{' {
		m.to = append(m.to, ',')
	}
	m.to = append(m.to, '"')
	m.to = append(m.to, name...)
	m.to = append(m.to, '"', ':')
}

func (m *members) text(name, value string) {
	if value != "" {
		m.always(name, value)
	}
}

func (m *members) always(name, value string) {
	m.name(name)
	m.to = appendString(m.to, value)
}

func (m *members) list(name string, values []string) {
	if len(values) == 0 {
		return
	}
	m.name(name)
	m.to = append(m.to, '[')
	for i, v := range values {
		if i > 0 {
			m.to = append(m.to, ',')
		}
		m.to = appendString(m.to, v)
	}
	m.to = append(m.to, ']')
}

func (m *members) time(name string, t time.Time) {
	m.name(name)
	to, err := t.AppendText(append(m.to, '"')) // RFC 3339, as JSON has it
	if err != nil {
		m.err = err
		return
	}
	m.to = append(to, '"')
}

// appendString appends s as a JSON string. One with anything in it that may have to be escaped is left to the library.
func appendString(to []byte, s string) []byte {
	for i := range len(s) {
		if b := s[i]; b < ' ' || b > '~' || b == '"' || b == '\\' || b == '<' || b == '>' || b == '&' {
			quoted, _ := json.Marshal(s) // a string cannot fail
			return append(to, quoted...)
		}
	}
	to = append(to, '"')
	to = append(to, s...)
	return append(to, '"')
}

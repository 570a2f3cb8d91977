//go:build integration

package limits

import (
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"fmt"
	"net"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"google.golang.org/grpc/encoding"

	"github.com/signet-ca/signet/internal/daemon"
)

const (
	attestPath = "/signet.v1.Authority/AttestAgent"
	issuePath  = "/signet.v1.Authority/Issue"
)

// TestSilence ends whoever does not go on: without a ClientHello, without a preface, in the middle of a header. All wait at
// once, and an agent is served meanwhile.
//
// threat: J01, J02
func TestSilence(t *testing.T) {
	p := newPort(t, daemon.Limits{Patience: 8 * time.Second})
	n := p.agent("node-1")
	type end struct {
		name  string
		after time.Duration
	}
	ends := make(chan end)
	mute := map[string]func() (net.Conn, error){
		"nothing": func() (net.Conn, error) { return from(2, p.addr) },
		"half a ClientHello": func() (net.Conn, error) {
			c, err := from(3, p.addr)
			if err == nil {
				_, err = c.Write([]byte{22, 3, 1, 2, 0, 1, 0, 1, 0xfc})
			}
			return c, err
		},
		"no preface": func() (net.Conn, error) {
			c, err := from(4, p.addr)
			if err != nil {
				return nil, err
			}
			s := tls.Client(c, p.config(nil))
			return s, s.Handshake()
		},
		"a header without end": func() (net.Conn, error) {
			r, err := p.raw(5, nil)
			if err != nil {
				return nil, err
			}
			return r.conn, r.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: call(attestPath)})
		},
		"a call without end": func() (net.Conn, error) {
			r, err := p.raw(6, nil)
			if err != nil {
				return nil, err
			}
			return r.conn, r.open(1, call(attestPath))
		},
		"no call": func() (net.Conn, error) {
			r, err := p.raw(7, nil)
			if err != nil {
				return nil, err
			}
			return r.conn, nil
		},
	}
	for name, start := range mute {
		c, err := start()
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		defer c.Close()
		began := time.Now()
		go func() {
			c.SetReadDeadline(time.Now().Add(longEnough))
			buf := make([]byte, 4096)
			for {
				if _, err := c.Read(buf); err != nil {
					ends <- end{name, time.Since(began)}
					return
				}
			}
		}()
	}
	n.issue()
	for range mute {
		e := <-ends
		t.Logf("%s: ended after %v", e.name, e.after.Round(time.Millisecond))
		if e.after >= longEnough-time.Second {
			t.Errorf("%s: never ended", e.name)
		}
	}
	n.issue()
}

// TestFloods sends what no client sends, as a stranger and as an agent: each flood is ended, or goes no faster than what is
// answered, and an agent's neighbour has its SVIDs meanwhile.
//
// threat: J02, J03, J04, J05
func TestFloods(t *testing.T) {
	p := newPort(t, daemon.Limits{Patience: 20 * time.Second})
	neighbour := p.agent("node-1")
	hostile := p.agent("node-2")
	goroutines := runtime.NumGoroutine()
	block := call(attestPath)
	for _, tt := range []struct {
		name   string
		send   func(r *raw, i int) error
		times  int
		member bool // it must be ended when it comes from an agent, too
		code   http2.ErrCode
	}{
		{"rapid reset", func(r *raw, i int) error {
			if err := r.open(uint32(2*i+1), block); err != nil {
				return err
			}
			return r.WriteRSTStream(uint32(2*i+1), http2.ErrCodeCancel)
		}, 10000, false, 0},
		{"continuations", func(r *raw, i int) error {
			if i == 0 {
				return r.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block})
			}
			return r.WriteContinuation(1, false, bytes.Repeat([]byte{0, 1, 'a', 1, 'b'}, 3000))
		}, 2000, true, 0},
		{"pings", func(r *raw, _ int) error { return r.WritePing(false, [8]byte{1}) }, 20000, true, http2.ErrCodeEnhanceYourCalm},
		{"settings", func(r *raw, _ int) error {
			return r.WriteSettings(http2.Setting{ID: http2.SettingHeaderTableSize, Val: 1})
		}, 20000, false, 0},
		{"empty data", func(r *raw, i int) error {
			if i == 0 {
				return r.open(1, block)
			}
			return r.WriteData(1, false, nil)
		}, 20000, false, 0},
		{"windows", func(r *raw, _ int) error { return r.WriteWindowUpdate(0, 1) }, 20000, false, 0},
		{"unknown frames", func(r *raw, _ int) error { return r.WriteRawFrame(0xfa, 0, 0, make([]byte, 64)) }, 20000, false, 0},
		{"a frame beyond the maximum", func(r *raw, _ int) error { return r.WriteRawFrame(http2.FrameData, 0, 1, make([]byte, 1<<20)) }, 10, true, 0},
	} {
		for _, as := range []string{"stranger", "agent"} {
			t.Run(tt.name+" of a "+as, func(t *testing.T) {
				cert, must := hostile.cert, tt.member
				if as == "stranger" {
					cert, must = nil, true
				}
				r, err := p.raw(2, cert)
				if err != nil {
					t.Fatal(err)
				}
				began := time.Now()
				sent := 0
				for sent < tt.times && tt.send(r, sent) == nil {
					sent++
				}
				took := time.Since(began)
				neighbour.issue()
				if must {
					r.ended(t)
				}
				r.mu.Lock()
				defer r.mu.Unlock()
				t.Logf("%d of %d sent in %v, GOAWAY %v", sent, tt.times, took.Round(time.Millisecond), r.goAway)
				if as == "agent" && tt.code != 0 && r.goAway != tt.code && r.goAway != 0 { // it may be lost when the connection ends
					t.Errorf("GOAWAY with %v, want %v", r.goAway, tt.code)
				}
			})
		}
	}
	settle(t, func() string {
		if n := runtime.NumGoroutine(); n > goroutines+8 { // some of the rig's own come and go
			return fmt.Sprintf("%d goroutines, %d before the floods", n, goroutines)
		}
		return ""
	})
}

// settle waits until f has nothing to say.
func settle(t *testing.T, f func() string) {
	t.Helper()
	say := "?"
	for began := time.Now(); say != "" && time.Since(began) < longEnough; time.Sleep(10 * time.Millisecond) {
		say = f()
	}
	if say != "" {
		t.Error(say)
	}
}

// TestTooLarge refuses a message above the maximum by its length, before there is room for it.
//
// threat: J06
func TestTooLarge(t *testing.T) {
	p := newPort(t, daemon.Limits{})
	n := p.agent("node-1")
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	const calls = 50
	for i := range calls {
		for _, size := range []uint32{4<<20 + 1, 1<<32 - 1} {
			r, err := p.raw(2+i, nil)
			if err != nil {
				t.Fatal(err)
			}
			if err := r.open(1, call(attestPath)); err != nil {
				t.Fatal(err)
			}
			if err := r.WriteData(1, false, binary.BigEndian.AppendUint32([]byte{0}, size)); err != nil {
				t.Fatal(err)
			}
			if got := r.said(t, "grpc-status"); got != "3" { // INVALID_ARGUMENT, with MESSAGE_TOO_LARGE
				t.Errorf("grpc-status %q for a message of %d bytes", got, size)
			}
			r.conn.Close()
		}
	}
	runtime.ReadMemStats(&after)
	each := (after.TotalAlloc - before.TotalAlloc) / (2 * calls)
	t.Logf("%d bytes were allocated for each, its connection and its client included", each)
	if each > 2<<20 {
		t.Errorf("%d bytes were allocated for a message that was refused", each)
	}
	n.issue()
}

// TestCompressed knows no compression, so nothing can be inflated; nor does any package that the servers link.
//
// threat: D12
func TestCompressed(t *testing.T) {
	p := newPort(t, daemon.Limits{})
	for i, name := range []string{"gzip", "deflate", "snappy", "zstd"} {
		if encoding.GetCompressor(name) != nil {
			t.Errorf("something links a decompressor for %s", name)
		}
		r, err := p.raw(2+i, nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := r.open(1, call(attestPath, "grpc-encoding", name)); err != nil {
			t.Fatal(err)
		}
		r.WriteData(1, true, append([]byte{1, 0, 0, 0, 4}, "bomb"...)) // may come late
		if got := r.said(t, "grpc-status"); got != "12" {
			t.Errorf("grpc-status %q for %s, want 12 (UNIMPLEMENTED)", got, name)
		}
	}
	for _, cmd := range []string{"signet-ca", "signet-agent"} {
		out, err := exec.Command("go", "list", "-deps", "github.com/signet-ca/signet/cmd/"+cmd).Output()
		if err != nil {
			t.Fatal(err)
		}
		for pkg := range strings.Lines(string(out)) {
			if pkg = strings.TrimSpace(pkg); strings.HasPrefix(pkg, "google.golang.org/grpc/encoding/") && !strings.HasSuffix(pkg, "/proto") && !strings.HasSuffix(pkg, "/internal") {
				t.Errorf("%s links %s", cmd, pkg)
			}
		}
	}
}

// TestPaths lets no call reach a handler by another spelling of its name, past what guards it.
//
// threat: J09
func TestPaths(t *testing.T) {
	p := newPort(t, daemon.Limits{Rate: 1000})
	n := p.agent("node-1")
	for _, path := range []string{
		"signet.v1.Authority/Issue", "signet.v1.Authority/AttestAgent", "//signet.v1.Authority/Issue", "/signet.v1.Authority/Issue/",
		"/signet.v1.Authority//Issue", "/signet.v1.authority/Issue", "/signet.v1.Authority/issue", "/signet.v1.Authority/Issue?a", "*", "/", "",
		"/signet.v1.Authority%2fIssue", "signet.v1.Admin/GetStatus", "/signet.v1.Admin/GetStatus", "https://ca/signet.v1.Authority/Issue",
		"grpc.health.v1.Health/Check", "/" + strings.Repeat("a", 15<<10), "/\x00",
	} {
		for _, cert := range []*tls.Certificate{nil, n.cert} {
			r, err := p.raw(2, cert)
			if err != nil {
				t.Fatal(err)
			}
			if err := r.open(1, call(path)); err != nil {
				t.Fatal(err)
			}
			r.WriteData(1, true, make([]byte, 5)) // an empty request
			switch got := r.said(t, "grpc-status"); got {
			case "12", "": // UNIMPLEMENTED, or an end without a word
			default:
				t.Errorf("path %.40q: grpc-status %s, want 12 (UNIMPLEMENTED)", path, got)
			}
			r.conn.Close()
		}
	}
	for path, want := range map[string]string{issuePath: "16", attestPath: "9"} { // who asks is looked at: the guards are there
		r, err := p.raw(2, nil)
		if err != nil {
			t.Fatal(err)
		}
		r.open(1, call(path))
		r.WriteData(1, true, make([]byte, 5))
		if got := r.said(t, "grpc-status"); got == "12" || got == "0" || got == "" {
			t.Errorf("path %s: grpc-status %q, want something like %s", path, got, want)
		}
	}
}

// slowly writes a few bytes at a time, as if each came in a packet of its own.
type slowly struct{ net.Conn }

func (s slowly) Write(p []byte) (int, error) {
	for i := 0; i < len(p); i += 100 {
		if _, err := s.Conn.Write(p[i:min(i+100, len(p))]); err != nil {
			return i, err
		}
	}
	return len(p), nil
}

// TestHandshakes takes TLS 1.3 with HTTP/2 and nothing else, whatever name is asked for and however the ClientHello comes.
//
// threat: J10, J11, J15, J16, J17
func TestHandshakes(t *testing.T) {
	p := newPort(t, daemon.Limits{Rate: 1000})
	for _, tt := range []struct {
		name   string
		change func(*tls.Config)
		ok     bool
	}{
		{"TLS 1.3", func(*tls.Config) {}, true},
		{"TLS 1.2, which can renegotiate", func(c *tls.Config) {
			c.MinVersion, c.MaxVersion, c.Renegotiation = tls.VersionTLS12, tls.VersionTLS12, tls.RenegotiateFreelyAsClient
		}, false},
		{"TLS 1.0", func(c *tls.Config) { c.MinVersion, c.MaxVersion = tls.VersionTLS10, tls.VersionTLS10 }, false},
		{"HTTP/1.1 alone", func(c *tls.Config) { c.NextProtos = []string{"http/1.1"} }, false},
		{"another protocol", func(c *tls.Config) { c.NextProtos = []string{"postgresql", "smtp"} }, false},
		{"no protocol", func(c *tls.Config) { c.NextProtos = nil }, false},
		{"a name that is none of ours", func(c *tls.Config) { c.ServerName = "kubernetes.default.svc" }, true},
		{"a name without end", func(c *tls.Config) { c.ServerName = strings.Repeat("a.", 2000) + "a" }, true},
		{"a name that is garbage", func(c *tls.Config) { c.ServerName = "a\x00\r\n\x1b[31m../" }, true},
		{"no hybrid key exchange: a second ClientHello is not needed", func(c *tls.Config) { c.CurvePreferences = []tls.CurveID{tls.X25519, tls.CurveP256} }, true},
		{"a rare curve", func(c *tls.Config) { c.CurvePreferences = []tls.CurveID{tls.CurveP521} }, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c, err := from(2, p.addr)
			if err != nil {
				t.Fatal(err)
			}
			c.SetDeadline(time.Now().Add(longEnough))
			config := p.config(nil)
			tt.change(config)
			s := tls.Client(slowly{c}, config)
			err = s.Handshake()
			if err == nil {
				var r *raw
				if r, err = begin(t, s); err == nil {
					if err = r.open(1, call("/grpc.health.v1.Health/Check")); err == nil {
						err = r.WriteData(1, true, make([]byte, 5))
					}
					if got := r.said(t, "grpc-status"); err == nil && got != "0" {
						err = net.ErrClosed
					}
				}
			}
			defer s.Close()
			if (err == nil) != tt.ok {
				t.Errorf("error %v, want success %v", err, tt.ok)
			}
			if state := s.ConnectionState(); tt.name == "TLS 1.3" && state.CurveID != tls.X25519MLKEM768 {
				t.Errorf("key exchange %v", state.CurveID)
			}
		})
	}
}

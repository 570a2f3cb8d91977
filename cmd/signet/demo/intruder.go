package demo

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// refusalTimeout is how long a server may take to refuse; one that says nothing is then asked for an answer.
const refusalTimeout = 2 * time.Second

// intrude has two clients call payments that it must not let in: a workload with a valid SVID of its own, and a client
// without any.
func (d *demo) intrude(ctx context.Context, ids map[string]spiffeid.ID) error {
	ctx, cancel := context.WithCancel(ctx) // ends the intruder's stream
	defer cancel()
	source, took, err := d.source(ctx, intruder, true)
	if err != nil {
		return err
	}
	svid, err := source.GetX509SVID()
	if err != nil {
		return err
	}
	if _, _, err := x509svid.Verify(svid.Certificates, source); err != nil {
		return fmt.Errorf("the intruder's SVID is not valid, so it would prove nothing: %w", err)
	}
	d.firstSVID = took
	d.say(intruder, "has a valid SVID of its own after %d ms, %s, and calls payments", took.Milliseconds(), svid.ID)
	for _, s := range []struct {
		who       string
		anonymous bool
		counted   func(refusals) uint64
	}{
		{svid.ID.String(), false, func(r refusals) uint64 { return r.stranger }},
		{"a client without a certificate", true, func(r refusals) uint64 { return r.nobody }},
	} {
		before, err := d.peers.refusals(ctx)
		if err != nil {
			return err
		}
		why, err := knock(ctx, d.peers.door, clientTLS(source, ids[payments], s.anonymous))
		if err != nil {
			return err
		}
		n, err := d.counted(ctx, s.counted, s.counted(before))
		if err != nil {
			return err
		}
		f := Refusal{Who: s.who, Refused: why != "", Why: why, Counted: n}
		d.report.Refused = append(d.report.Refused, f)
		if f.Refused {
			d.say(payments, "refused %s: %q, counted %d", f.Who, f.Why, f.Counted)
		} else {
			d.say(payments, "LET IN %s", f.Who)
		}
	}
	return nil
}

// counted returns how many refusals more than before payments has counted. It may count a moment after the refused one
// has heard of it.
func (d *demo) counted(ctx context.Context, of func(refusals) uint64, before uint64) (uint64, error) {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		now, err := d.peers.refusals(ctx)
		if err != nil {
			return 0, err
		}
		if n := of(now) - before; n > 0 {
			return n, nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return 0, nil
		}
	}
}

// knock connects to a server that should refuse, and returns what the refusal says; "" when there was an answer. An error
// means that it is not known. In TLS 1.3 a client learns only after its own handshake whether it was accepted.
func knock(ctx context.Context, door netip.AddrPort, config *tls.Config) (why string, err error) {
	dialer := tls.Dialer{Config: config}
	conn, err := dialer.DialContext(ctx, "tcp", door.String())
	if err != nil {
		return "", fmt.Errorf("payments is not reached: %w", err)
	}
	defer conn.Close()
	if err := conn.SetReadDeadline(time.Now().Add(refusalTimeout)); err != nil {
		return "", err
	}
	if _, err = conn.Read(make([]byte, 1)); err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		return refusal(err), nil
	}
	if _, err := fmt.Fprintf(conn, "GET /pay HTTP/1.1\r\nHost: payments\r\nConnection: close\r\n\r\n"); err != nil {
		return refusal(err), nil
	}
	if err := conn.SetReadDeadline(time.Now().Add(requestTimeout)); err != nil {
		return "", err
	}
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return "", fmt.Errorf("payments neither refused nor answered: %w", err)
	case err != nil: // a refusal that was late; whether it was one, the counter tells
		return refusal(err), nil
	}
	resp.Body.Close()
	return "", nil
}

// refusal is what a broken connection says for people, without the addresses.
func refusal(err error) string {
	if op, ok := errors.AsType[*net.OpError](err); ok && op.Err != nil {
		return op.Err.Error()
	}
	return err.Error()
}

package kube

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"sync"

	"k8s.io/client-go/rest"
)

// The channels of a port-forward over a WebSocket (k8s.io/cri-streaming): what the port says and hears, and what the node
// has to say of it. The first message of each is the port's number.
const (
	portForwardProtocol = "v4.channel.k8s.io"
	channelData         = 0
	channelError        = 1
	portBytes           = 2
	maxChunk            = 32 << 10 // of what is sent at once
)

// PortForward connects to a port on the loopback of a pod, through the API server and the pod's node: nobody has to listen
// on this machine for it, and nobody else here can use it. The connection ends with ctx. What goes over it the API server
// and the node can read and change, so it has to be TLS.
func (o *Operator) PortForward(ctx context.Context, namespace, pod string, port int) (net.Conn, error) {
	path := "/api/v1/namespaces/" + url.PathEscape(namespace) + "/pods/" + url.PathEscape(pod) + "/portforward"
	asking, cancel := o.limit(ctx)
	defer cancel()
	body, err := o.upgrade(asking, path, url.Values{"ports": {strconv.Itoa(port)}})
	if err != nil {
		return nil, err
	}
	f := &forwarded{socket: &webSocket{r: bufio.NewReader(body), w: body}, body: body, done: make(chan struct{})}
	f.Conn, f.inner = net.Pipe()
	f.wg.Go(f.fromPod)
	f.wg.Go(f.toPod)
	f.stop = context.AfterFunc(ctx, func() { f.end(context.Cause(ctx)) })
	return f, nil
}

// upgrade asks for a WebSocket and returns the connection.
func (o *Operator) upgrade(ctx context.Context, path string, query url.Values) (io.ReadWriteCloser, error) {
	h, err := o.upgrading()
	if err != nil {
		return nil, err
	}
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, o.client.base+path+"?"+query.Encode(), nil)
	if err != nil {
		return nil, err
	}
	key := newKey()
	for name, value := range map[string]string{
		"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": key,
		"Sec-WebSocket-Protocol": portForwardProtocol,
	} {
		r.Header.Set(name, value)
	}
	resp, err := h.Do(r)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusSwitchingProtocols {
		defer resp.Body.Close()
		return nil, failure(resp)
	}
	body, ok := resp.Body.(io.ReadWriteCloser)
	if !ok || resp.Header.Get("Sec-WebSocket-Accept") != acceptKey(key) || resp.Header.Get("Sec-WebSocket-Protocol") != portForwardProtocol {
		resp.Body.Close()
		return nil, errors.New("what answers for the API server does not speak the protocol of port-forwards over WebSockets")
	}
	return body, nil
}

// upgrading is the client for what becomes another protocol: as the other one, but HTTP/1.1 alone, which can be upgraded.
func (o *Operator) upgrading() (*http.Client, error) {
	o.upgradeOnce.Do(func() {
		cfg := rest.CopyConfig(o.config)
		cfg.NextProtos = []string{"http/1.1"}
		if o.upgrades, o.upgradeErr = rest.HTTPClientFor(cfg); o.upgradeErr == nil {
			o.upgrades.CheckRedirect = noRedirects
		}
	})
	return o.upgrades, o.upgradeErr
}

// forwarded is one end of a pipe whose other end is a port of a pod.
type forwarded struct {
	net.Conn
	inner  net.Conn
	socket *webSocket
	body   io.Closer
	stop   func() bool
	wg     sync.WaitGroup

	once sync.Once
	done chan struct{} // closed when it has ended
	why  error         // then why; nil: the pod or we closed it
}

// end ends it. The first reason counts.
func (f *forwarded) end(why error) {
	f.once.Do(func() {
		f.why = why
		close(f.done)
		f.inner.Close()
		f.body.Close()
	})
}

// Read implements net.Conn. The end of a connection that was ended by the node says what the node said.
func (f *forwarded) Read(p []byte) (int, error) {
	n, err := f.Conn.Read(p)
	if err == nil || errors.Is(err, io.ErrClosedPipe) {
		return n, err
	}
	select {
	case <-f.done:
		if f.why != nil {
			return n, f.why
		}
	default:
	}
	return n, err
}

// Close implements net.Conn; nothing of the connection is left when it returns.
func (f *forwarded) Close() error {
	f.stop()
	err := f.Conn.Close()
	f.end(nil)
	f.wg.Wait()
	return err
}

// fromPod hands over what the port says.
func (f *forwarded) fromPod() {
	var numbered [2]bool
	for {
		m, err := f.socket.receive()
		switch {
		case err == io.EOF:
			f.end(nil)
			return
		case err != nil:
			f.end(fmt.Errorf("the port-forward broke off: %w", err))
			return
		case len(m) == 0 || m[0] > channelError:
			f.end(errFrame)
			return
		}
		channel, data := m[0], m[1:]
		if !numbered[channel] {
			if numbered[channel] = true; len(data) != portBytes {
				f.end(errFrame)
				return
			}
			continue
		}
		if channel == channelError {
			f.end(fmt.Errorf("the node says: %.300q", data))
			return
		}
		if _, err := f.inner.Write(data); err != nil {
			f.end(nil)
			return
		}
	}
}

// toPod hands over what is said to the port.
func (f *forwarded) toPod() {
	buf := make([]byte, maxChunk)
	for {
		n, err := f.inner.Read(buf)
		if n > 0 {
			if err := f.socket.send(opBinary, []byte{channelData}, buf[:n]); err != nil {
				f.end(fmt.Errorf("the port-forward broke off: %w", err))
				return
			}
		}
		if err != nil {
			f.end(nil)
			return
		}
	}
}

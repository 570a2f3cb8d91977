package ca

import (
	"context"
	"fmt"
	"net"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/peer"
	"google.golang.org/protobuf/proto"

	"github.com/signet-ca/signet/api"
)

// What an operator looks at can be large: the record, all SVIDs, all nodes. Whoever asks for much of it at once and reads
// none of the answers would have the CA keep them all, and it dies where its memory ends. So those who look at the operators'
// port take turns, a turn lasts until gRPC has given the answer away, and whoever does not take what he asked for loses his
// connection to those who wait. The admin socket has none of it: its user owns the process.

// Bounds of those who look.
const (
	maxLooks     = 2                // at once; as many again of those who may do more than look
	maxLookQueue = 32               // who wait for their turn
	lookPatience = 10 * time.Second // how long they wait
	takeTime     = 30 * time.Second // what was sent may wait to be taken while somebody else waits for the turn
	takePulse    = time.Second      // how often it is looked at after that
)

// lookers are those who look. A crowd of viewers keeps nobody from looking who is to do something about it.
type lookers struct {
	viewers, others *gate

	mu      sync.Mutex
	answers map[proto.Message]*look // that were not encoded yet
}

func newLookers() *lookers {
	return &lookers{viewers: newGate(maxLooks, maxLookQueue), others: newGate(maxLooks, maxLookQueue), answers: map[proto.Message]*look{}}
}

// look is the turn of one who looks. All methods may be called on nil, which is the turn of one who needs none.
type look struct {
	of   *lookers
	gate *gate
	conn *lookConn

	mu    sync.Mutex
	ended bool
	timer *time.Timer // runs while something of the answer waits to be taken; nil otherwise
}

// look waits for a turn of who makes the call of ctx. It fails with Overloaded, or as ctx does; after a nil error end or
// answer must be called.
func (ca *CA) look(ctx context.Context) (*look, error) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return nil, nil
	}
	info, ok := p.AuthInfo.(operatorsInfo)
	if !ok {
		return nil, nil
	}
	who, g := admitted(ctx), ca.lookers.others
	if len(who.roles) == 1 {
		g = ca.lookers.viewers
	}
	waiting, cancel := context.WithTimeout(ctx, lookPatience)
	defer cancel()
	if err := g.enter(waiting, who.name); err != nil {
		if ctx.Err() == nil && waiting.Err() != nil {
			err = overloaded()
		}
		return nil, err
	}
	l := &look{of: ca.lookers, gate: g, conn: info.conn}
	if !info.conn.begin(l) {
		l.end()
		return nil, context.Canceled
	}
	return l, nil
}

// looked makes the one answer of a call in its turn, which lasts until gRPC has no need of the answer any more.
func looked[M proto.Message](ctx context.Context, ca *CA, look func() M) (m M, err error) {
	l, err := ca.look(ctx)
	if err != nil {
		return m, err
	}
	made := false
	defer func() {
		if !made {
			l.end()
		}
	}()
	m = look()
	made = true
	l.answer(m)
	return m, nil
}

// end gives the turn to the next. Only the first call counts.
func (l *look) end() {
	if l == nil {
		return
	}
	l.sent()
	l.mu.Lock()
	ended := l.ended
	l.ended = true
	l.mu.Unlock()
	if !ended {
		l.conn.forget(l)
		l.gate.leave()
	}
}

// sending says that from now on something waits to be taken.
func (l *look) sending() {
	if l == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ended || l.timer != nil {
		return
	}
	var t *time.Timer
	t = time.AfterFunc(takeTime, func() {
		l.mu.Lock()
		late := l.timer == t && l.gate.crowded()
		if l.timer == t && !late {
			t.Reset(takePulse)
		}
		l.mu.Unlock()
		if late {
			l.conn.Close() // which ends the turn
		}
	})
	l.timer = t
}

// sent says that nothing waits any more.
func (l *look) sent() {
	if l == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.timer != nil {
		l.timer.Stop()
		l.timer = nil
	}
}

// answer says that m is the answer of a call that has no other, and leaves the turn to it.
func (l *look) answer(m proto.Message) {
	if l == nil {
		return
	}
	l.of.mu.Lock()
	l.of.answers[m] = l
	l.of.mu.Unlock()
	l.sending()
	l.conn.answers(l, m)
}

// claim returns the turn whose answer m is; nil where there is none.
func (o *lookers) claim(m proto.Message) *look {
	o.mu.Lock()
	defer o.mu.Unlock()
	l := o.answers[m]
	delete(o.answers, m)
	return l
}

// crowded reports whether anybody waits for a turn.
func (g *gate) crowded() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.lines.waiting > 0
}

// lookConn is a connection to the operators' port, which knows the turns of its calls: they end with it at the latest.
type lookConn struct {
	net.Conn

	mu     sync.Mutex
	closed bool
	looks  map[*look]proto.Message // with their answers; nil where there is none, or none yet
}

// begin keeps a turn; false where the connection is closed already.
func (c *lookConn) begin(l *look) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return false
	}
	if c.looks == nil {
		c.looks = map[*look]proto.Message{}
	}
	c.looks[l] = nil
	return true
}

func (c *lookConn) answers(l *look, m proto.Message) {
	c.mu.Lock()
	closed := c.closed
	if !closed {
		c.looks[l] = m
	}
	c.mu.Unlock()
	if closed {
		l.of.claim(m)
		l.end()
	}
}

func (c *lookConn) forget(l *look) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.looks, l)
}

// Close implements net.Conn. Turns whose calls have answered end with it; of the others their calls end.
func (c *lookConn) Close() error {
	err := c.Conn.Close()
	c.mu.Lock()
	c.closed = true
	var over []*look
	for l, m := range c.looks {
		if m != nil {
			l.of.claim(m)
			over = append(over, l)
		}
	}
	c.mu.Unlock()
	for _, l := range over {
		l.end()
	}
	return err
}

// lookCodec is the codec of every port, but that it ends the turn of an answer when its bytes are given away.
type lookCodec struct {
	encoding.CodecV2
	of *lookers
}

func newLookCodec(o *lookers) lookCodec { return lookCodec{api.ServerCodec(), o} }

// Marshal implements encoding.CodecV2.
func (c lookCodec) Marshal(v any) (mem.BufferSlice, error) {
	m, ok := v.(proto.Message)
	if !ok {
		return c.CodecV2.Marshal(v)
	}
	l := c.of.claim(m)
	if l == nil {
		return c.CodecV2.Marshal(v)
	}
	data, err := proto.Marshal(m)
	if err != nil {
		l.end()
		return nil, fmt.Errorf("encode an answer: %w", err)
	}
	if mem.IsBelowBufferPoolingThreshold(cap(data)) { // gRPC does not say when it is done with so little
		l.end()
		return mem.BufferSlice{mem.SliceBuffer(data)}, nil
	}
	return mem.BufferSlice{mem.NewBuffer(&data, untilPut(l.end))}, nil
}

// untilPut is the pool of one buffer, which is told when that is not needed any more.
type untilPut func()

// Get implements mem.BufferPool. Nobody takes anything out of it.
func (untilPut) Get(length int) *[]byte { b := slices.Grow([]byte(nil), length)[:length]; return &b }

// Put implements mem.BufferPool.
func (f untilPut) Put(*[]byte) { f() }

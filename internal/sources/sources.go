// Package sources bounds what one address, and all of them, may ask a server
// for: see [New].
package sources

import (
	"net"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// Limits of a server. An address is an IPv4 address, or the /64 of an IPv6 one.
type Limits struct {
	Connections         int // of all addresses together
	ConnectionsPerHost  int
	HandshakesPerSecond int // of an address; twice as many at once
	RequestsPerSecond   int // of an address
}

// maxSources bounds how many addresses are remembered.
const maxSources = 8192

// Gate bounds what one address, and all of them, may ask for. It is
// asked before anything expensive is done.
type Gate struct {
	config Limits
	now    func() time.Time

	mu      sync.Mutex
	open    int
	sources map[netip.Prefix]*source
}

type source struct {
	open       int
	handshakes *rate.Limiter
	requests   *rate.Limiter
	seen       time.Time
}

// New returns a gate for these limits, all of which must be positive.
func New(l Limits) *Gate {
	return &Gate{config: l, now: time.Now, sources: make(map[netip.Prefix]*source)}
}

// origin is what counts as one source: an IPv4 address, or the /64 that an
// IPv6 host can take its addresses from.
func origin(a netip.Addr) netip.Prefix {
	bits := 32
	if a.Is6() {
		bits = 64
	}
	p, _ := a.Prefix(bits) // within the address's length
	return p
}

// of finds or makes a source; nil when there are too many that have connections. g.mu is held.
func (g *Gate) of(a netip.Addr) *source {
	key, now := origin(a), g.now()
	s := g.sources[key]
	if s == nil {
		if len(g.sources) >= maxSources {
			g.forget(now.Add(-time.Minute))
			if len(g.sources) > maxSources/2 {
				// Somebody has many addresses. Those without a connection have their rates
				// anew, once in a while, and nobody is kept out.
				g.forget(now)
			}
		}
		if len(g.sources) >= maxSources {
			return nil
		}
		s = &source{handshakes: rate.NewLimiter(rate.Limit(g.config.HandshakesPerSecond), 2*g.config.HandshakesPerSecond),
			requests: rate.NewLimiter(rate.Limit(g.config.RequestsPerSecond), g.config.RequestsPerSecond)}
		g.sources[key] = s
	}
	s.seen = now
	return s
}

// forget drops sources without a connection that were not seen since a moment.
func (g *Gate) forget(since time.Time) {
	for k, s := range g.sources {
		if s.open == 0 && !s.seen.After(since) {
			delete(g.sources, k)
		}
	}
}

// Enter takes a place for a connection. Every true is paid back by Leave.
func (g *Gate) Enter(a netip.Addr) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	s := g.of(a)
	if s == nil || g.open >= g.config.Connections || s.open >= g.config.ConnectionsPerHost || !s.handshakes.AllowN(s.seen, 1) {
		return false
	}
	g.open++
	s.open++
	return true
}

// Leave gives a place back.
func (g *Gate) Leave(a netip.Addr) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.open--
	if s := g.sources[origin(a)]; s != nil {
		s.open--
	}
}

// Request says whether one more request of an address is in its rate.
func (g *Gate) Request(a netip.Addr) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	s := g.of(a)
	return s != nil && s.requests.AllowN(s.seen, 1)
}

// Listener turns connections away that the gate does not let in, before a
// handshake; refused is called for each.
func (g *Gate) Listener(l net.Listener, refused func()) net.Listener { return &listener{l, g, refused} }

type listener struct {
	net.Listener
	gate    *Gate
	refused func()
}

// Accept implements net.Listener.
func (l *listener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		at, err := netip.ParseAddrPort(c.RemoteAddr().String())
		if a := at.Addr().Unmap().WithZone(""); err == nil && l.gate.Enter(a) {
			return &conn{Conn: c, leave: sync.OnceFunc(func() { l.gate.Leave(a) })}, nil
		}
		l.refused()
		_ = c.Close() // it was never used
	}
}

// conn gives its place back when it closes.
type conn struct {
	net.Conn
	leave func()
}

// Close implements net.Conn.
func (c *conn) Close() error {
	c.leave()
	return c.Conn.Close()
}

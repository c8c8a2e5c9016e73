package signer

import (
	"errors"
	"net/netip"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/time/rate"
)

var errTooFast = errors.New("too many requests from this address")

// maxSources bounds how many addresses are remembered.
const maxSources = 8192

// sourceGate bounds what one address, and all of them, may ask for. It is
// asked before anything expensive is done.
type sourceGate struct {
	config  *RemoteConfig
	now     func() time.Time
	refused *prometheus.CounterVec // connections, by why

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

func newSourceGate(c *RemoteConfig) *sourceGate {
	return &sourceGate{config: c, now: time.Now, sources: make(map[netip.Prefix]*source),
		refused: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "inkan_signer_remote_refused_total", Help: "connections from other hosts that were turned away before their handshake"}, []string{"why"})}
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

// of finds or makes a source; nil when there are too many. g.mu is held.
func (g *sourceGate) of(a netip.Addr) *source {
	key, now := origin(a), g.now()
	s := g.sources[key]
	if s == nil {
		if len(g.sources) >= maxSources {
			for k, old := range g.sources {
				if old.open == 0 && now.Sub(old.seen) > time.Minute {
					delete(g.sources, k)
				}
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

// enter takes a place for a connection. Every true is paid back by leave.
func (g *sourceGate) enter(a netip.Addr) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	s := g.of(a)
	if s == nil || g.open >= g.config.MaxConnections || s.open >= g.config.ConnectionsPerHost || !s.handshakes.AllowN(s.seen, 1) {
		return false
	}
	g.open++
	s.open++
	return true
}

func (g *sourceGate) leave(a netip.Addr) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.open--
	if s := g.sources[origin(a)]; s != nil {
		s.open--
	}
}

// request says whether one more request of an address is in its rate.
func (g *sourceGate) request(a netip.Addr) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	s := g.of(a)
	return s != nil && s.requests.AllowN(s.seen, 1)
}

package gate

import (
	"net/http"
	"net/netip"
	"sync"

	"golang.org/x/time/rate"

	"inkan/internal/sources"
)

// Limits bound what may come, before anything expensive is done with it. Zero
// is the default. An address is an IPv4 address, or the /64 of an IPv6 one.
type Limits struct {
	Connections             int // at a time; 4096 by default
	ConnectionsPerHost      int // of an address; 256 by default
	HandshakesPerSecond     int // of an address; 50 by default
	RequestsPerSecond       int // of an address; 5000 by default
	AgentRequestsPerSecond  int // of an agent, wherever it is; 2000 by default
	ConcurrentVerifications int // requests that are checked at a time; 256 by default
}

// maxAgents bounds how many agents' rates are remembered; those of the CA may be fewer.
const maxAgents = 65536

func (l *Limits) complete() {
	for _, x := range []struct {
		to       *int
		standard int
	}{{&l.Connections, 4096}, {&l.ConnectionsPerHost, 256}, {&l.HandshakesPerSecond, 50}, {&l.RequestsPerSecond, 5000}, {&l.AgentRequestsPerSecond, 2000}, {&l.ConcurrentVerifications, 256}} {
		if *x.to <= 0 {
			*x.to = x.standard
		}
	}
}

// limiter is Limits at work.
type limiter struct {
	limits Limits
	hosts  *sources.Gate
	busy   chan struct{}

	mu     sync.Mutex
	agents map[string]*rate.Limiter
}

func newLimiter(l Limits) *limiter {
	l.complete()
	return &limiter{limits: l, busy: make(chan struct{}, l.ConcurrentVerifications), agents: make(map[string]*rate.Limiter),
		hosts: sources.New(sources.Limits{Connections: l.Connections, ConnectionsPerHost: l.ConnectionsPerHost, HandshakesPerSecond: l.HandshakesPerSecond, RequestsPerSecond: l.RequestsPerSecond})}
}

// admit is asked first for each request: it looks at the address and at the name
// in the certificate, which the handshake has verified.
func (l *limiter) admit(req *http.Request) error {
	at, err := netip.ParseAddrPort(req.RemoteAddr)
	if err != nil {
		return refuse(ReasonNetwork, "the connection has no IP address")
	}
	if !l.hosts.Request(at.Addr().Unmap().WithZone("")) {
		return refuse(ReasonRate, "more than %d requests a second from this address", l.limits.RequestsPerSecond)
	}
	if req.TLS == nil || len(req.TLS.PeerCertificates) == 0 || len(req.TLS.PeerCertificates[0].URIs) == 0 {
		return nil // it is refused for that
	}
	if !l.agent(req.TLS.PeerCertificates[0].URIs[0].String()) {
		return refuse(ReasonRate, "more than %d requests a second of this agent", l.limits.AgentRequestsPerSecond)
	}
	return nil
}

func (l *limiter) agent(id string) bool {
	l.mu.Lock()
	r := l.agents[id]
	if r == nil {
		if len(l.agents) >= maxAgents {
			clear(l.agents) // each has its rate anew, once in a while
		}
		r = rate.NewLimiter(rate.Limit(l.limits.AgentRequestsPerSecond), l.limits.AgentRequestsPerSecond)
		l.agents[id] = r
	}
	l.mu.Unlock()
	return r.Allow()
}

// take takes a place for checking one request, or says that there is none.
func (l *limiter) take() error {
	select {
	case l.busy <- struct{}{}:
		return nil
	default:
		return refuse(ReasonRate, "%d requests are being checked, and that is the most", l.limits.ConcurrentVerifications)
	}
}

func (l *limiter) give() { <-l.busy }

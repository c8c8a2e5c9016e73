package gate

import (
	"io"
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

// maxBodies is how many bodies are read at a time, of all agents together, as a
// multiple of the requests that are checked at a time.
const maxBodies = 16

// limiter is Limits at work.
type limiter struct {
	limits Limits
	hosts  *sources.Gate
	busy   chan struct{}

	mu      sync.Mutex
	agents  map[string]*rate.Limiter
	bodies  map[string]int // that are being read, by agent
	reading int            // all of them
}

func newLimiter(l Limits) *limiter {
	l.complete()
	return &limiter{limits: l, busy: make(chan struct{}, l.ConcurrentVerifications), agents: make(map[string]*rate.Limiter), bodies: make(map[string]int),
		hosts: sources.New(sources.Limits{Connections: l.Connections, ConnectionsPerHost: l.ConnectionsPerHost, HandshakesPerSecond: l.HandshakesPerSecond, RequestsPerSecond: l.RequestsPerSecond})}
}

// address is asked first for each request.
func (l *limiter) address(req *http.Request) error {
	at, err := netip.ParseAddrPort(req.RemoteAddr)
	if err != nil {
		return refuse(ReasonNetwork, "the connection has no IP address")
	}
	if !l.hosts.Request(at.Addr().Unmap().WithZone("")) {
		return refuse(ReasonRate, "more than %d requests a second from this address", l.limits.RequestsPerSecond)
	}
	return nil
}

// agent is asked once the client's certificate was checked: who has a revoked one, or comes
// from elsewhere, must not use up what the agent may send.
func (l *limiter) agent(id string) error {
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
	if !r.Allow() {
		return refuse(ReasonRate, "more than %d requests a second of this agent", l.limits.AgentRequestsPerSecond)
	}
	return nil
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

// takeBody takes a place for a body that is yet to come. An agent has as many as there are
// places for checking, so that it holds up itself alone.
func (l *limiter) takeBody(agent string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if most := l.limits.ConcurrentVerifications; l.bodies[agent] >= most || l.reading >= maxBodies*most {
		return refuse(ReasonRate, "%d requests of this agent wait for their bodies, and that is the most", l.bodies[agent])
	}
	l.bodies[agent]++
	l.reading++
	return nil
}

func (l *limiter) giveBody(agent string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.reading--
	if l.bodies[agent]--; l.bodies[agent] == 0 {
		delete(l.bodies, agent)
	}
}

// arriving is the body of a request that has a place for checking. While it waits for the
// client's bytes the place is another's: who sends slowly keeps nobody from being checked.
type arriving struct {
	io.ReadCloser
	limiter *limiter
	read    func() // gives the body's place back
}

// Read implements io.Reader.
func (a *arriving) Read(b []byte) (int, error) {
	a.limiter.give()
	n, err := a.ReadCloser.Read(b)
	a.limiter.busy <- struct{}{} // places are given back soon: nobody who has one waits for a client
	if err != nil {
		a.read()
	}
	return n, err
}

// Package proxy lets agents in any language speak mutual TLS with a key that
// they do not have: [New] makes a [Proxy] of an agent's listener, [Proxy.Serve] takes
// plain HTTP or bytes from the agent and sends them on over TLS 1.3.
//
// It connects to the destinations that the scope in the agent's certificate
// names and to no other, and serves the processes that its configuration names
// and no other. It is a transport: it neither signs actions nor reads them.
package proxy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"inkan/internal/caller"
	"inkan/internal/problem"
	"inkan/scope"
	"inkan/wire"
)

// Rules of the proxy itself, beside those of package wire. docs/proxy.md lists them.
const (
	RuleCaller  scope.Rule = "caller"  // the process may not use this listener
	RuleRequest scope.Rule = "request" // the request is not one that a proxy forwards
	RuleLimit   scope.Rule = "limit"   // too many connections
	RuleSize    scope.Rule = "size"    // the body is too large
)

func refuse(rule scope.Rule, format string, a ...any) *scope.Refusal {
	return &scope.Refusal{Rule: rule, Message: fmt.Sprintf(format, a...)}
}

// unidentified refuses whom the kernel or the host said nothing of; why is for the log.
func unidentified(why error) *scope.Refusal {
	return &scope.Refusal{Rule: RuleCaller, Message: "the process at the other end could not be identified; the proxy's log says why", Cause: why}
}

// Bounds of connections from agents.
const (
	maxHeader     = 160 << 10 // has room for the largest action
	overLimit     = 32        // connections beyond the limit that are told so; others are closed
	lookAtTunnels = time.Second
	stopTimeout   = 10 * time.Second
	bufferSize    = 32 << 10
)

// Proxy serves one listener of an agent.
type Proxy struct {
	config  *ListenerConfig
	dialer  *wire.Dialer
	owners  *caller.Owners
	metrics *agentMetrics
	log     *slog.Logger
	http    *httputil.ReverseProxy
	open    atomic.Int64 // connections

	mu      sync.Mutex
	tunnels map[*tunnel]struct{}
	// upgraded are connections of HTTP that speak something else by now, or ask to.
	upgraded map[*visitor]struct{}
}

// New makes a proxy. owners is for a listener on the loopback.
func New(l *ListenerConfig, agent string, d *wire.Dialer, owners *caller.Owners, m *Metrics, log *slog.Logger) *Proxy {
	p := &Proxy{config: l, dialer: d, owners: owners, metrics: m.agent(agent), log: log.With("agent", agent, "listener", l.Listen), tunnels: make(map[*tunnel]struct{}), upgraded: make(map[*visitor]struct{})}
	upstream := d.Transport(l.MaxConnections)
	upstream.SignRequests = l.SignRequests
	p.http = &httputil.ReverseProxy{
		Transport: &bounded{upstream, l.answer}, Rewrite: rewrite, ErrorHandler: p.failed, BufferPool: buffers{},
		ErrorLog: slog.NewLogLogger(p.log.Handler(), slog.LevelDebug), // answers that an agent did not wait for
	}
	return p
}

// Listen opens the listener. On a unix socket the kernel states the sender of
// all that arrives.
func (l *ListenerConfig) Open() (net.Listener, error) {
	path, isUnix := strings.CutPrefix(l.Listen, "unix:")
	if !isUnix {
		return net.Listen("tcp", l.Listen)
	}
	// Who may connect is not who may use it: that is a matter of callers.
	u, err := caller.Listen(path, 0o666)
	if err != nil {
		return nil, err
	}
	u.SetUnlinkOnClose(false) // a sandbox may not remove it; the next start does
	return u, nil
}

// Serve accepts connections from l until ctx ends; then requests that run come
// to their end. It closes l.
func (p *Proxy) Serve(ctx context.Context, l net.Listener) error {
	in := &listener{Listener: l, p: p}
	if p.config.Protocol == TCP {
		return p.serveTunnels(ctx, in)
	}
	s := &http.Server{
		Handler: p, ReadHeaderTimeout: 30 * time.Second, IdleTimeout: 10 * time.Minute, MaxHeaderBytes: maxHeader, ErrorLog: slog.NewLogLogger(p.log.Handler(), slog.LevelDebug),
		ConnContext: func(ctx context.Context, c net.Conn) context.Context { return context.WithValue(ctx, visitorKey{}, c) },
	}
	done := make(chan error, 1)
	stop := context.AfterFunc(ctx, func() {
		end, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
		defer cancel()
		err := s.Shutdown(end)
		if err != nil {
			err = errors.Join(err, s.Close())
		}
		done <- err
	})
	watch, cancel := context.WithCancel(ctx)
	defer cancel()
	go p.watch(watch)
	err := s.Serve(in)
	if stop() {
		return err // the listener failed
	}
	return <-done
}

type visitorKey struct{}

// visitor is a connection of an agent, whoever it is.
type visitor struct {
	net.Conn
	p       *Proxy
	process *caller.Process // of a unix socket
	refused error           // nil: it may use the listener
	once    sync.Once

	upgraded atomic.Pointer[target] // where it leads, once it may speak another protocol than HTTP
}

// Read implements net.Conn. What is no HTTP any more is nobody's but the process's that
// opened the connection; of HTTP the requests and their bodies are looked at.
func (v *visitor) Read(b []byte) (int, error) {
	n, err := v.Conn.Read(b)
	if n > 0 && v.upgraded.Load() != nil {
		if err := v.may(); err != nil {
			return 0, err
		}
	}
	return n, err
}

// ownBody is a request's body, of which nobody else has sent a part.
type ownBody struct {
	io.ReadCloser
	v *visitor
}

// Read implements io.Reader.
func (o *ownBody) Read(b []byte) (int, error) {
	n, err := o.ReadCloser.Read(b)
	if err := o.v.may(); err != nil {
		return 0, err
	}
	return n, err
}

// Close closes the connection.
func (v *visitor) Close() error {
	v.once.Do(func() { v.p.open.Add(-1); v.p.metrics.connections.Dec() })
	return v.Conn.Close()
}

// may says why the connection may not be used, now.
func (v *visitor) may() error {
	switch {
	case v.refused != nil:
		return v.refused
	case v.process == nil:
		return nil
	case v.process.Stranger() != 0:
		return refuse(RuleCaller, "process %d sent something on a connection of process %d: a connection is of use to the process that opened it alone", v.process.Stranger(), v.process.PID)
	case !v.process.Alive():
		return refuse(RuleCaller, "%v", caller.ErrGone)
	}
	return nil
}

// listener identifies who connects.
type listener struct {
	net.Listener
	p *Proxy
}

// Accept implements net.Listener.
func (l *listener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		n := l.p.open.Add(1)
		l.p.metrics.connections.Inc()
		v := &visitor{Conn: c, p: l.p}
		if n > int64(l.p.config.MaxConnections)+overLimit {
			l.p.metrics.refuse(RuleLimit)
			_ = v.Close() // it was not read from
			continue
		}
		v.identify()
		if v.refused == nil && n > int64(l.p.config.MaxConnections) {
			v.refused = refuse(RuleLimit, "%d connections are open, and that is the most", l.p.config.MaxConnections)
		}
		return v, nil
	}
}

// identify asks the kernel who connected.
func (v *visitor) identify() {
	var uid uint32
	switch c := v.Conn.(type) {
	case *net.UnixConn:
		process, err := caller.Identify(c)
		if err != nil {
			v.refused = unidentified(err)
			return
		}
		uid, v.process, v.Conn = process.UID, process, caller.NewConn(c, process)
	case *net.TCPConn:
		var err error
		if uid, err = v.p.owners.UID(c.RemoteAddr().(*net.TCPAddr).AddrPort(), c.LocalAddr().(*net.TCPAddr).AddrPort()); err != nil {
			v.refused = unidentified(err)
			return
		}
	}
	if err := v.p.config.allows(uid, v.process); err != nil {
		v.refused = err
	}
}

// ServeHTTP implements http.Handler.
func (p *Proxy) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	begun := time.Now()
	defer func() { p.metrics.seconds.Observe(time.Since(begun).Seconds()) }()
	v, ok := req.Context().Value(visitorKey{}).(*visitor)
	if !ok {
		p.answer(w, req, refuse(RuleCaller, "the connection is nobody's"))
		return
	}
	// 1. May this process use it, still?
	if err := v.may(); err != nil {
		w.Header().Set("Connection", "close")
		p.answer(w, req, err)
		return
	}
	// 2. Where does the request go? 3. Does the scope name that?
	to, err := p.target(req)
	if err == nil {
		_, err = p.dialer.Destination(to.host, to.port)
	}
	if err != nil {
		p.answer(w, req, err)
		return
	}
	// 4. Is it small enough?
	if req.ContentLength > p.config.MaxBody {
		w.Header().Set("Connection", "close") // the body is not read
		p.answer(w, req, p.tooLarge())
		return
	}
	if req.ContentLength != 0 { // -1: not known
		req.Body = http.MaxBytesReader(w, &ownBody{req.Body, v}, p.config.MaxBody)
	}
	if req.Header.Get("Upgrade") != "" { // if the server agrees this does not return before the connection ends
		v.upgraded.Store(to)
		p.mu.Lock()
		p.upgraded[v] = struct{}{}
		p.mu.Unlock()
		defer func() {
			p.mu.Lock()
			delete(p.upgraded, v)
			p.mu.Unlock()
			v.upgraded.Store(nil)
		}()
	}
	// 5. Forwarded.
	p.http.ServeHTTP(w, req.WithContext(context.WithValue(req.Context(), targetKey{}, to)))
}

func (p *Proxy) tooLarge() error {
	return refuse(RuleSize, "a body of at most %d bytes is expected", p.config.MaxBody)
}

type targetKey struct{}

// target is where a request goes.
type target struct {
	host string
	port uint16
	name string // as it stands in the Host header
}

func (p *Proxy) target(req *http.Request) (*target, error) {
	absolute := req.URL.Host != ""
	switch {
	case req.Method == http.MethodConnect:
		return nil, refuse(RuleRequest, "CONNECT is not forwarded: send the request itself, in plain HTTP, and the proxy speaks TLS")
	case absolute && req.URL.Scheme != "http":
		return nil, refuse(RuleRequest, "%.16q: an http URL is expected, and the proxy speaks TLS", req.URL.Scheme)
	case req.URL.User != nil || req.URL.Opaque != "":
		return nil, refuse(RuleRequest, "a URL with a host, a path and a query is expected")
	}
	name := req.Host
	if p.config.Upstream != "" && !absolute {
		name = p.config.Upstream
	}
	host, port, err := wire.HostPort(name)
	if err != nil {
		return nil, err
	}
	if p.config.Upstream != "" && (host != p.config.host || port != p.config.port) {
		return nil, refuse(scope.RuleDestinations, "this listener leads to %s alone", p.config.Upstream)
	}
	return &target{host, port, strings.TrimSuffix(name, ":443")}, nil
}

// rewrite makes the server's request of the agent's: the same method, path,
// query, headers and body.
func rewrite(r *httputil.ProxyRequest) {
	to := r.In.Context().Value(targetKey{}).(*target)
	r.Out.URL.Scheme, r.Out.URL.Host, r.Out.Host = "https", scope.Destination{Host: to.host, Port: to.port}.Address(), to.name
	r.Out.URL.RawQuery = r.In.URL.RawQuery // as it came
}

// bounded gives up a server that does not begin to answer.
type bounded struct {
	*wire.Transport
	answer time.Duration
}

// RoundTrip implements http.RoundTripper.
func (b *bounded) RoundTrip(req *http.Request) (*http.Response, error) {
	ctx, cancel := context.WithCancelCause(req.Context())
	late := refuse(wire.RuleUnreachable, "the server did not begin to answer in %s", b.answer)
	timer := time.AfterFunc(b.answer, func() { cancel(late) })
	res, err := b.Transport.RoundTrip(req.WithContext(ctx))
	if !timer.Stop() && err != nil && context.Cause(ctx) == late {
		err = late
	}
	if err != nil {
		cancel(nil)
		return nil, err
	}
	res.Body = &ending{res.Body, func() { cancel(nil) }}
	return res, nil
}

// ending ends a request's context with the answer's body.
type ending struct {
	io.ReadCloser
	end func()
}

// Close implements io.Closer.
func (e *ending) Close() error {
	err := e.ReadCloser.Close()
	e.end()
	return err
}

// Write is for answers 101, whose body is both ways.
func (e *ending) Write(b []byte) (int, error) {
	w, ok := e.ReadCloser.(io.Writer)
	if !ok {
		return 0, errors.New("the answer is not a connection")
	}
	return w.Write(b)
}

// failed answers where there is no answer of the server.
func (p *Proxy) failed(w http.ResponseWriter, req *http.Request, err error) {
	if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
		err = p.tooLarge()
	}
	p.answer(w, req, err)
}

// statuses of refusals by their rules.
var statuses = map[scope.Rule]int{
	RuleCaller: http.StatusForbidden, scope.RuleDestinations: http.StatusForbidden, RuleRequest: http.StatusBadRequest, wire.RuleRequestSignature: http.StatusBadRequest, RuleSize: http.StatusRequestEntityTooLarge,
	RuleLimit: http.StatusServiceUnavailable, wire.RuleNoCertificate: http.StatusServiceUnavailable, wire.RuleDevice: http.StatusServiceUnavailable,
	wire.RuleTLS: http.StatusBadGateway, wire.RuleUnreachable: http.StatusBadGateway,
}

func (p *Proxy) answer(w http.ResponseWriter, req *http.Request, err error) {
	r := refusalOf(err)
	p.refused(req.Context(), r)
	problem.Write(w, problem.Problem{Status: statuses[r.Rule], Title: "not forwarded", Detail: r.Message, Rule: string(r.Rule)})
}

// refusalOf is the refusal in err, or one for it.
func refusalOf(err error) *scope.Refusal {
	if r, ok := errors.AsType[*scope.Refusal](err); ok {
		return r
	}
	return &scope.Refusal{Rule: wire.RuleUnreachable, Message: "the request was not answered; the proxy's log says why", Cause: err}
}

func (p *Proxy) refused(ctx context.Context, r *scope.Refusal) {
	p.metrics.refuse(r.Rule)
	a := []any{"rule", r.Rule, "detail", r.Message}
	if r.Cause != nil {
		a = append(a, "cause", r.Cause)
	}
	p.log.WarnContext(ctx, "refused", a...)
}

// buffers are lent to copies of bodies.
type buffers struct{}

var pool = sync.Pool{New: func() any { b := make([]byte, bufferSize); return &b }}

// Get implements httputil.BufferPool.
func (buffers) Get() []byte { return *pool.Get().(*[]byte) }

// Put implements httputil.BufferPool.
func (buffers) Put(b []byte) { pool.Put(&b) }

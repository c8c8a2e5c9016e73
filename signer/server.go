package signer

import (
	"bytes"
	"context"
	_ "embed"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"sync"
	"time"

	"github.com/coreos/go-systemd/v22/activation"
	"github.com/coreos/go-systemd/v22/daemon"

	"inkan/audit"
	"inkan/internal/caller"
	"inkan/internal/problem"
	"inkan/scope"
)

//go:embed openapi.json
var openAPI []byte

type peerKey struct{}

// Serve serves the agents' socket until ctx ends, then finishes what is under
// way. ready is called when the socket is open.
func (s *Signer) Serve(ctx context.Context, ready func()) error {
	l, err := s.listen()
	if err != nil {
		return err
	}
	server := &http.Server{
		Handler: s.handler(), ReadHeaderTimeout: 10 * time.Second, ReadTimeout: 30 * time.Second, WriteTimeout: 60 * time.Second, IdleTimeout: 10 * time.Minute, MaxHeaderBytes: 16 << 10, ErrorLog: slog.NewLogLogger(s.log.Handler(), slog.LevelWarn),
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return context.WithValue(ctx, peerKey{}, c.(*callerConn).peer)
		},
	}
	renewals, stopRenewals := context.WithCancel(ctx)
	defer stopRenewals()
	renewed := make(chan struct{})
	go func() {
		defer close(renewed)
		var wg sync.WaitGroup
		wg.Go(func() { s.renewAll(renewals) })
		wg.Go(func() { s.checkpointAll(renewals) })
		wg.Go(func() { s.watchControls(renewals) })
		wg.Go(func() { s.watchClock(renewals) })
		wg.Go(func() { s.watchKills(renewals) })
		wg.Go(func() { s.keepReserves(renewals) })
		wg.Wait()
	}()

	errs := make(chan error, 4)
	servers := []*http.Server{server}
	if s.remote != nil {
		rl, err := s.remote.listen()
		if err != nil {
			return errors.Join(err, l.Close())
		}
		m := &http.Server{Handler: s.handler(), ReadHeaderTimeout: 10 * time.Second, ReadTimeout: 30 * time.Second, WriteTimeout: 60 * time.Second, IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 16 << 10,
			ErrorLog: server.ErrorLog, ConnContext: withRemote}
		servers = append(servers, m)
		go func() { errs <- m.Serve(rl) }()
	}
	if s.config.MetricsListen != "" {
		m := &http.Server{Handler: s.metrics.handler(), ReadHeaderTimeout: 10 * time.Second}
		ml, err := net.Listen("tcp", s.config.MetricsListen)
		if err != nil {
			return errors.Join(fmt.Errorf("metrics_listen: %w", err), l.Close())
		}
		servers = append(servers, m)
		go func() { errs <- m.Serve(ml) }()
	}
	// An agent that inkan run has started has one connection for its life, so it may be idle.
	s.bound = newBoundListener(l.Addr())
	started := &http.Server{Handler: server.Handler, ReadHeaderTimeout: server.ReadHeaderTimeout, ReadTimeout: server.ReadTimeout, WriteTimeout: server.WriteTimeout, IdleTimeout: -1,
		MaxHeaderBytes: server.MaxHeaderBytes, ErrorLog: server.ErrorLog, ConnContext: server.ConnContext}
	servers = append(servers, started)
	go func() { errs <- started.Serve(s.bound) }()
	go func() { errs <- server.Serve(&callerListener{Listener: l, log: s.log, most: perUser}) }()
	ready()
	notify(daemon.SdNotifyReady)
	select {
	case <-ctx.Done():
	case err = <-errs:
	}
	notify(daemon.SdNotifyStopping)
	stopRenewals()
	<-renewed
	stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	for _, x := range servers {
		err = errors.Join(err, x.Shutdown(stop))
	}
	s.lastCheckpoints(ctx)
	return err
}

// notify tells systemd; without systemd there is nobody to tell.
func notify(state string) { _, _ = daemon.SdNotify(false, state) }

// perUser bounds the connections of one user: each takes two descriptors, of which
// the signer would have none left for others.
const perUser = 1024

// callerListener identifies who opens a connection.
type callerListener struct {
	net.Listener
	log  *slog.Logger
	most int // connections of a user

	mu   sync.Mutex
	open map[uint32]int // by user
}

// callerConn is a connection of an identified process; peer is nil if it could
// not be identified.
type callerConn struct {
	*caller.Conn
	peer  *peer
	once  sync.Once
	leave func()
	watch *os.File // ends the connection with its process; nil: the connection is not bound to it
}

func (l *callerListener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		u := c.(*net.UnixConn)
		p, err := caller.Identify(u)
		if err != nil {
			l.log.Error("a caller could not be identified", "error", err)
			return &callerConn{Conn: caller.NewConn(u, nil), leave: func() {}}, nil
		}
		conn := &callerConn{Conn: caller.NewConn(u, p), peer: &peer{Process: p}, leave: func() { l.count(p.UID, -1) }}
		if l.count(p.UID, 1) <= l.most {
			return conn, nil
		}
		_ = conn.Close() // it was not served
	}
}

// count counts a user's connections, and says once that they are too many.
func (l *callerListener) count(uid uint32, more int) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.open == nil {
		l.open = make(map[uint32]int)
	}
	n := l.open[uid] + more
	if l.open[uid] = n; n == 0 {
		delete(l.open, uid)
	}
	if more > 0 && n == l.most {
		l.log.Warn("a user has as many connections as one may, more are closed", "uid", uid, "connections", n)
	}
	return n
}

func (c *callerConn) Close() error {
	err := c.Conn.Close()
	c.once.Do(func() {
		c.leave()
		if c.watch != nil {
			_ = c.watch.Close() // nothing is written to it
		}
		if c.peer != nil && c.peer.bound != nil {
			c.peer.bound.close()
		}
	})
	return err
}

// listen opens the socket, or takes the one that systemd has opened.
func (s *Signer) listen() (net.Listener, error) {
	given, err := activation.Listeners()
	if err != nil {
		return nil, fmt.Errorf("socket activation: %w", err)
	}
	if len(given) > 0 {
		if l, ok := given[0].(*net.UnixListener); ok && len(given) == 1 {
			return l, caller.PassCredentials(l)
		}
		return nil, errors.New("socket activation: exactly one unix socket is expected")
	}
	l, err := caller.Listen(s.config.Socket, s.config.mode)
	if err != nil {
		return nil, err
	}
	return l, nil
}

// AgentInfo is what an agent can ask about itself.
type AgentInfo struct {
	Name        string    `json:"name"`
	ID          string    `json:"id"`          // SPIFFE ID
	Certificate string    `json:"certificate"` // PEM, leaf first
	NotAfter    time.Time `json:"not_after"`
	Scope       string    `json:"scope"`       // canonical JSON
	Description []string  `json:"description"` // of the scope, in words
	Entries     uint64    `json:"entries"`     // in the record

	Utilisation []scope.Utilisation `json:"utilisation"` // of the limits over time, now
	Controls    scope.Controls      `json:"controls"`    // kills and policy in force
}

// Receipt is what an agent can ask about an action.
type Receipt struct {
	ID        string `json:"id"`
	Counter   uint64 `json:"counter"`
	Statement []byte `json:"statement"` // base64 of the exact bytes
	JWS       string `json:"jws,omitempty"`
}

func (s *Signer) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /v1/actions", s.as(s.act))
	mux.HandleFunc("GET /v1/agent", s.as(func(w http.ResponseWriter, r *http.Request, a *Agent) {
		info, err := a.info(r.Context())
		if err != nil {
			s.fail(w, err)
			return
		}
		problem.JSON(w, http.StatusOK, info)
	}))
	mux.HandleFunc("GET /v1/status", s.asOperator(func(w http.ResponseWriter, r *http.Request) {
		problem.JSON(w, http.StatusOK, s.status(r.Context()))
	}))
	mux.HandleFunc("POST /v1/kill", s.asOperator(s.kill))
	mux.HandleFunc("POST /v1/rearm", s.asOperator(s.document(scope.EventRearm, rearmAgent)))
	mux.HandleFunc("POST /v1/policy", s.asOperator(s.document(scope.EventPolicy, policyAgent)))
	mux.HandleFunc("POST /v1/acknowledgements", s.asOperator(s.acknowledge))
	mux.HandleFunc("GET /v1/receipts/{id}", s.as(func(w http.ResponseWriter, r *http.Request, a *Agent) {
		id := r.PathValue("id")
		if b, err := base64.RawURLEncoding.DecodeString(id); err != nil || len(b) != 16 {
			problem.Write(w, problem.Problem{Status: http.StatusBadRequest, Detail: "an action id is expected"})
			return
		}
		e, err := a.log.Lookup(r.Context(), id)
		switch {
		case err != nil:
			s.fail(w, err)
		case e == nil:
			problem.Write(w, problem.Problem{Status: http.StatusNotFound, Detail: "no action with this id is in the record"})
		default:
			problem.JSON(w, http.StatusOK, Receipt{ID: id, Counter: e.Counter, Statement: e.Statement, JWS: e.JWS})
		}
	}))
	mux.HandleFunc("POST /v1/checkpoint", s.as(s.postCheckpoint))
	mux.HandleFunc("GET /v1/checkpoint", s.as(s.getCheckpoint))
	mux.HandleFunc("POST /v1/agents/{agent}/recovery", s.recover)
	mux.HandleFunc("GET /v1/starts/{agent}", s.offer)
	mux.HandleFunc("POST /v1/starts", s.start)
	mux.HandleFunc("GET /openapi.json", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write(openAPI) // the client may be gone
	})
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		for _, a := range s.agents {
			if err := a.log.Err(); err != nil {
				s.log.Error("not healthy", "agent", a.name, "error", err)
				problem.Write(w, problem.Problem{Status: http.StatusServiceUnavailable, Detail: fmt.Sprintf("agent %s: %v; the signer's log says why", a.name, audit.ErrFailed)})
				return
			}
		}
		_, _ = w.Write([]byte("ok\n")) // the client may be gone
	})
	return whole(mux)
}

// maxBody is more than any request's body may have; each handler has its own bound.
const maxBody = 1 << 20

// whole reads a request of a process of this host to its end before anything is asked about
// who sent it: another process, to which the descriptor was passed on, may have sent the
// body of a request that the agent began.
func whole(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if p, _ := r.Context().Value(peerKey{}).(*peer); p != nil && r.ContentLength != 0 {
			b, err := io.ReadAll(io.LimitReader(r.Body, maxBody))
			rest := io.Reader(bytes.NewReader(b))
			if err != nil {
				rest = io.MultiReader(rest, failing{err})
			}
			r.Body = io.NopCloser(rest)
		}
		next.ServeHTTP(w, r)
	})
}

// failing is what could not be read.
type failing struct{ err error }

func (f failing) Read([]byte) (int, error) { return 0, f.err }

// as authenticates the caller (step 1) and hands on the one agent that it is.
func (s *Signer) as(f func(http.ResponseWriter, *http.Request, *Agent)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		defer func() {
			if p := recover(); p != nil {
				s.fail(w, fmt.Errorf("panic: %v", p))
			}
		}()
		if c, ok := r.Context().Value(remoteKey{}).(*remoteConn); ok {
			name, err := s.remote.agentOf(r, c)
			switch {
			case errors.Is(err, errTooFast):
				w.Header().Set("Retry-After", "1")
				problem.Write(w, problem.Problem{Status: http.StatusTooManyRequests, Detail: err.Error()})
			case err != nil:
				s.unidentified(w, r, err)
			default:
				f(w, r, s.agents[name])
			}
			return
		}
		p, _ := r.Context().Value(peerKey{}).(*peer)
		if p != nil && p.bound != nil {
			if s.alone(w, r, p) {
				s.asStarted(w, r, p, f)
			}
			return
		}
		who := s.processOf(w, r)
		if who == nil {
			return
		}
		name, ok := s.config.agentFor(who)
		if !ok {
			s.unknown(w, r, "no agent's callers include it", who)
			return
		}
		f(w, r, s.agents[name])
	}
}

// processOf says which process of this host asks; if it cannot, it answers, and returns nil.
func (s *Signer) processOf(w http.ResponseWriter, r *http.Request) *process {
	p, _ := r.Context().Value(peerKey{}).(*peer)
	if p == nil {
		s.unknown(w, r, "its process could not be identified", nil)
		return nil
	}
	if !s.alone(w, r, p) {
		return nil
	}
	if p.bound != nil {
		s.unknown(w, r, "a process that was started as an agent is nothing else", nil)
		return nil
	}
	who, err := p.describe(&s.digests, s.units)
	if err != nil {
		s.unidentified(w, r, err)
		return nil
	}
	return who
}

// asOperator lets the operators' processes through, and nobody from another host.
func (s *Signer) asOperator(f http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if s.operator(w, r) != nil {
			f(w, r)
		}
	}
}

// operator says which operator's process asks; if it is none, it answers, and returns nil.
func (s *Signer) operator(w http.ResponseWriter, r *http.Request) *process {
	who := s.processOf(w, r)
	if who == nil {
		return nil
	}
	for _, o := range s.config.Operators {
		if o.is(who) {
			return who
		}
	}
	s.unknown(w, r, "it is none of the operators'", who)
	return nil
}

// alone: nobody but the process that opened the connection has sent on it; otherwise it answers.
func (s *Signer) alone(w http.ResponseWriter, r *http.Request, p *peer) bool {
	n := p.Stranger()
	if n != 0 {
		s.unknown(w, r, fmt.Sprintf("process %d sent something on a connection of process %d: a connection is of use to the process that opened it alone", n, p.PID), nil)
	}
	return n == 0
}

// asStarted serves a process that inkan run has started.
func (s *Signer) asStarted(w http.ResponseWriter, r *http.Request, p *peer, f func(http.ResponseWriter, *http.Request, *Agent)) {
	a := p.bound.agent
	err := p.bound.check(p)
	if refusal, ok := errors.AsType[*scope.Refusal](err); ok {
		if cred := a.current.Load(); cred != nil {
			err = a.refuse(r.Context(), nil, refusal, cred, &p.bound.run)
		}
		s.fail(w, err)
		return
	}
	if err != nil {
		s.unidentified(w, r, err)
		return
	}
	f(w, r.WithContext(context.WithValue(r.Context(), runKey{}, &p.bound.run)), a)
}

// runKey is for the *scope.Run of a process that was started under confinement.
type runKey struct{}

// unidentified refuses a caller that err says why of.
func (s *Signer) unidentified(w http.ResponseWriter, r *http.Request, err error) {
	if x, ok := errors.AsType[*inside](err); ok {
		s.log.ErrorContext(r.Context(), "a caller could not be identified", "error", x.cause)
	}
	s.unknown(w, r, err.Error(), nil)
}

// inside is what goes wrong with the host while a caller is identified: the caller is
// told what, and the log why.
type inside struct {
	what  string
	cause error
}

func (x *inside) Error() string { return x.what + "; the signer's log says why" }

// Unwrap returns the cause.
func (x *inside) Unwrap() error { return x.cause }

func (s *Signer) unknown(w http.ResponseWriter, r *http.Request, why string, who *process) {
	s.metrics.callers.Inc()
	detail := "the caller may not act as any agent: " + why
	if who != nil {
		// The caller knows all of this of itself; an operator needs it to configure.
		detail = fmt.Sprintf("%s (uid %d, executable %x, unit %q)", detail, who.UID, who.Executable, who.Unit)
	}
	s.log.WarnContext(r.Context(), "unknown caller", "detail", detail)
	problem.Write(w, problem.Problem{Status: http.StatusForbidden, Title: "unknown caller", Rule: string(RuleCaller), Detail: detail})
}

func (s *Signer) act(w http.ResponseWriter, r *http.Request, a *Agent) {
	begun := time.Now()
	defer func() { s.metrics.action.Observe(time.Since(begun).Seconds()) }()
	if !s.take(w, a) {
		return
	}
	defer func() { <-a.busy }()
	body, err := io.ReadAll(io.LimitReader(r.Body, scope.MaxAction+1))
	if err != nil {
		problem.Write(w, problem.Problem{Status: http.StatusBadRequest, Detail: "the request's body could not be read"})
		return
	}
	run, _ := r.Context().Value(runKey{}).(*scope.Run)
	signed, err := a.Act(r.Context(), body, run, r.Header.Values(AuthorizationHeader))
	if err != nil {
		s.fail(w, err)
		return
	}
	problem.JSON(w, http.StatusOK, signed)
}

// fail answers with a refusal or an error.
func (s *Signer) fail(w http.ResponseWriter, err error) {
	if r, ok := errors.AsType[*scope.Refusal](err); ok {
		status := http.StatusForbidden
		switch r.Rule {
		case scope.RuleForm, scope.RuleControlForm:
			status = http.StatusBadRequest
		case RuleNoCertificate, RuleDevice, RuleNoApprover, scope.RuleRollback:
			status = http.StatusServiceUnavailable
		}
		if left := time.Until(r.FreeAt); !r.FreeAt.IsZero() && left > 0 {
			w.Header().Set("Retry-After", fmt.Sprint(int64(left/time.Second)+1))
		}
		problem.Write(w, problem.Problem{Status: status, Title: "action refused", Detail: r.Message, Rule: string(r.Rule), Field: r.Field, Value: r.Value, Limit: r.Limit, Excess: r.Excess,
			Key: r.Key, Used: r.Used, Left: r.Left, Block: string(r.Block), FreeAt: r.FreeAt})
		return
	}
	if errors.Is(err, audit.ErrConflict) {
		problem.Write(w, problem.Problem{Status: http.StatusConflict, Title: "action id used before", Detail: audit.ErrConflict.Error()})
		return
	}
	s.log.Error("request failed", "error", err)
	detail := "the signer could not do it; its log says why"
	if errors.Is(err, audit.ErrFailed) {
		detail = audit.ErrFailed.Error()
	}
	problem.Write(w, problem.Problem{Status: http.StatusServiceUnavailable, Detail: detail})
}

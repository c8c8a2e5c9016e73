package gate

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"time"

	"inkan/verify"
)

// Bounds of a gate's server. maxHeader has room for the largest action.
const (
	maxHeader   = 160 << 10
	readTimeout = 30 * time.Second
)

// Serve accepts connections from l until ctx is done; then it lets requests
// that run come to their end. It closes l.
func (g *Gate) Serve(ctx context.Context, l net.Listener) error {
	s := &http.Server{
		Handler:           g,
		TLSConfig:         g.TLSConfig(),
		ReadHeaderTimeout: 10 * time.Second,
		ReadTimeout:       readTimeout,
		WriteTimeout:      readTimeout + g.c.BackendTimeout + 10*time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    maxHeader,
		ErrorLog:          slog.NewLogLogger(g.log.Handler(), slog.LevelWarn), // handshakes that fail
	}
	done := make(chan error, 1)
	stop := context.AfterFunc(ctx, func() {
		end, cancel := context.WithTimeout(context.WithoutCancel(ctx), g.c.BackendTimeout+5*time.Second)
		defer cancel()
		err := s.Shutdown(end)
		if err != nil {
			err = errors.Join(err, s.Close())
		}
		done <- err
	})
	err := s.ServeTLS(g.limiter.hosts.Listener(l, g.metrics.turned.Inc), "", "")
	if stop() {
		return err // the listener failed
	}
	return <-done
}

// response remembers what the log line says.
type response struct {
	http.ResponseWriter
	status int
}

// Unwrap is for http.ResponseController.
func (r *response) Unwrap() http.ResponseWriter { return r.ResponseWriter }

// WriteHeader implements http.ResponseWriter.
func (r *response) WriteHeader(status int) {
	if r.status == 0 && status >= 200 {
		r.status = status
	}
	r.ResponseWriter.WriteHeader(status)
}

// Write implements http.ResponseWriter.
func (r *response) Write(b []byte) (int, error) {
	if r.status == 0 {
		r.status = http.StatusOK
	}
	return r.ResponseWriter.Write(b)
}

func (g *Gate) report(req *http.Request, x *exchange, out *response, begin time.Time) {
	a := []any{"method", req.Method, "path", req.URL.Path, "status", out.status, "duration", time.Since(begin)}
	if x.peer != nil {
		a = append(a, "agent", x.peer.ID, "address", x.peer.Address)
	} else {
		a = append(a, "address", req.RemoteAddr)
	}
	refusal, _ := errors.AsType[*verify.Refusal](x.refused)
	if refusal == nil && x.refused != nil {
		refusal = &verify.Refusal{Cause: x.refused}
	}
	g.metrics.count(x.forwarded, refusal, time.Since(begin))
	if refusal != nil {
		a = append(a, "reason", refusal.Reason, "detail", refusal.Detail)
		if refusal.Cause != nil {
			a = append(a, "cause", refusal.Cause)
		}
	}
	switch {
	case x.forwarded && refusal != nil:
		g.log.ErrorContext(req.Context(), "backend failed", a...)
	case x.forwarded:
		g.log.InfoContext(req.Context(), "forwarded", a...)
	default:
		g.log.WarnContext(req.Context(), "refused", a...)
	}
}

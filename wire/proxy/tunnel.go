package proxy

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"inkan/scope"
	"inkan/wire"
)

// tunnel is a connection of an agent and the one to its server.
type tunnel struct {
	in   *visitor
	out  *tls.Conn
	last atomic.Int64 // when a byte went either way, nanoseconds since 1970
}

// serveTunnels takes bytes both ways until ctx ends.
func (p *Proxy) serveTunnels(ctx context.Context, l net.Listener) error {
	stop := context.AfterFunc(ctx, func() { _ = l.Close() }) // Accept says so
	defer stop()
	watch, cancel := context.WithCancel(ctx)
	defer cancel()
	go p.watch(watch)
	var wg sync.WaitGroup
	for {
		c, err := l.Accept()
		if err != nil {
			stopping := ctx.Err() != nil
			p.finish(&wg, stopping)
			if stopping {
				return nil
			}
			return errors.Join(err, l.Close())
		}
		wg.Go(func() { p.tunnel(ctx, c.(*visitor)) })
	}
}

// finish lets tunnels come to their end, for a while.
func (p *Proxy) finish(wg *sync.WaitGroup, wait bool) {
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	limit := time.Duration(0)
	if wait {
		limit = stopTimeout
	}
	select {
	case <-done:
	case <-time.After(limit):
		p.closeTunnels(func(*tunnel) *scope.Refusal { return refuse(wire.RuleUnreachable, "the proxy stops") })
		<-done
	}
}

func (p *Proxy) tunnel(ctx context.Context, in *visitor) {
	defer in.Close()
	begun := time.Now()
	err := in.may()
	var out *tls.Conn
	if err == nil {
		out, err = p.dialer.Dial(ctx, p.config.host, p.config.port, "")
	}
	p.metrics.seconds.Observe(time.Since(begun).Seconds())
	if err != nil {
		p.refused(ctx, refusalOf(err))
		return
	}
	defer out.Close()
	t := &tunnel{in: in, out: out}
	t.last.Store(time.Now().UnixNano())
	p.mu.Lock()
	p.tunnels[t] = struct{}{}
	p.mu.Unlock()
	defer func() {
		p.mu.Lock()
		delete(p.tunnels, t)
		p.mu.Unlock()
	}()
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := t.copy(out, in, in.may); err != nil {
			if r, ok := errors.AsType[*scope.Refusal](err); ok {
				p.refused(ctx, r)
			}
			_, _ = out.Close(), in.Close() // the other way ends too
			return
		}
		_ = out.CloseWrite() // the server may still have something to say
	})
	if err := t.copy(in, out, nil); err != nil {
		if errors.As(wire.Explain(err), new(*scope.Refusal)) && !errors.Is(err, net.ErrClosed) {
			p.log.InfoContext(ctx, "a connection ended", "error", err)
		}
		_, _ = out.Close(), in.Close() // likewise
	} else if h, ok := in.Conn.(interface{ CloseWrite() error }); ok {
		_ = h.CloseWrite() // likewise
	}
	wg.Wait()
}

// copy takes bytes one way to their end. may, if not nil, is asked after each read.
func (t *tunnel) copy(to io.Writer, from io.Reader, may func() error) error {
	b := pool.Get().(*[]byte)
	defer pool.Put(b)
	for {
		n, err := from.Read(*b)
		if n > 0 {
			t.last.Store(time.Now().UnixNano())
			if may != nil {
				if err := may(); err != nil {
					return err
				}
			}
			if _, err := to.Write((*b)[:n]); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// endUpgraded ends connections that have left HTTP and may no longer be.
func (p *Proxy) endUpgraded() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for v := range p.upgraded {
		to := v.upgraded.Load()
		if to == nil {
			continue
		}
		_, err := p.dialer.Destination(to.host, to.port)
		if err == nil {
			err = v.may()
		}
		if err != nil {
			p.refused(context.Background(), refusalOf(err))
			_ = v.Close() // the other side ends with it
		}
	}
}

// watch ends tunnels that may no longer be: the scope that is in force now does not name the
// destination, the process has ended, or nothing went through for too long.
func (p *Proxy) watch(ctx context.Context) {
	tick := time.NewTicker(lookAtTunnels)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-tick.C:
			if p.config.Protocol != TCP {
				p.endUpgraded()
				continue
			}
			_, err := p.dialer.Destination(p.config.host, p.config.port)
			p.closeTunnels(func(t *tunnel) *scope.Refusal {
				why := err
				if why == nil {
					why = t.in.may()
				}
				if idle := p.config.idle; why == nil && idle > 0 && now.UnixNano()-t.last.Load() > int64(idle) {
					why = refuse(RuleLimit, "no byte went either way for %s", idle)
				}
				r, _ := errors.AsType[*scope.Refusal](why)
				return r
			})
		}
	}
}

// closeTunnels closes those that are refused.
func (p *Proxy) closeTunnels(refused func(*tunnel) *scope.Refusal) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for t := range p.tunnels {
		if r := refused(t); r != nil {
			p.refused(context.Background(), r)
			_, _ = t.in.Close(), t.out.Close() // both are over
		}
	}
}

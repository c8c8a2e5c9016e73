package verify

import (
	"context"
	"sync"
	"time"
)

const (
	// attemptTimeout bounds one attempt to get a list.
	attemptTimeout = 15 * time.Second
	// patience is how long the request that begins an attempt waits for it where the
	// list that is there is still good. Others do not wait.
	patience = time.Second
	// retryAfter is how soon a source that failed is asked again.
	retryAfter = time.Second
)

// renewal gets a list again when it is due: one attempt at a time, which belongs to none of
// the requests that wait for it. A client that leaves must not end it, or it could keep what
// was revoked or stopped from being seen; and a source that hangs must hold nobody up
// while the list is good. mu guards it and the list.
type renewal struct {
	mu     sync.Mutex
	loaded time.Time     // when the list that is there was asked for
	tried  time.Time     // when the last attempt began
	err    error         // of the last attempt
	done   chan struct{} // closed at the end of the attempt under way; nil: there is none
}

// due is called with mu held, and returns so. get does not need mu; what it returns puts the
// list into place, and is called with mu held.
func (r *renewal) due(ctx context.Context, good bool, now time.Time, get func(context.Context) (place func() error, err error)) {
	begin := r.done == nil && (r.err == nil || now.Sub(r.tried) >= retryAfter)
	if begin {
		done := make(chan struct{})
		r.done, r.tried = done, now
		go func() {
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), attemptTimeout)
			defer cancel()
			place, err := get(ctx)
			r.mu.Lock()
			if err == nil {
				err = place()
			}
			if r.err = err; err == nil {
				r.loaded = now
			}
			r.done = nil
			r.mu.Unlock()
			close(done)
		}()
	}
	done := r.done
	if done == nil || good && !begin {
		return
	}
	wait := attemptTimeout
	if good {
		wait = patience
	}
	r.mu.Unlock()
	defer r.mu.Lock()
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-done:
	case <-ctx.Done():
	case <-timer.C:
	}
}

package hsm

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"
)

// Options of a token. The zero value is ready for use.
type Options struct {
	Module    string                            // path of the PKCS#11 module; default: the URI's module-path
	PINSource string                            // see ReadPIN; default: the URI's pin-source
	Timeout   time.Duration                     // of one call of the module, twelve times that where a key is made; default 5 s; the worker is killed beyond it
	Sessions  int                               // at most so many signatures at a time; default 16; the token may have fewer
	Env       []string                          // more environment for the worker, such as SOFTHSM2_CONF=/path
	Unseal    func(file []byte) ([]byte, error) // opens a sealed PIN; nil: none is
	Worker    []string                          // command that calls RunWorker; default: this binary with hsm-worker
}

const (
	defaultTimeout  = 5 * time.Second
	defaultSessions = 16
	maxSessions     = 256
	// Workers start at most so often: at once, then after firstPause, doubled each time up to maxPause.
	firstPause = 100 * time.Millisecond
	maxPause   = 30 * time.Second
	// breakAfter failures in a row calls are refused at once during the pause.
	breakAfter = 4
	// generatePatience is how many times longer than any other call the making of
	// a key may take: for large RSA keys tokens look for primes.
	generatePatience = 12
	// throttleLimit answers like CKR_DEVICE_ERROR in a row are taken for a dead device.
	throttleLimit = 8
)

// Token is a PKCS#11 token behind a worker process. It is safe for concurrent use.
type Token struct {
	uri  *URI
	opt  Options
	pin  PIN
	now  func() time.Time
	stop context.Context
	end  context.CancelFunc

	mu         sync.Mutex
	child      *child
	starting   chan struct{} // not nil while a worker starts
	generation uint64
	failures   int // in a row, without a good signature between them
	notBefore  time.Time
	fatal      error // a refused PIN, or closed
	stats      Stats
}

// Stats is what metrics show of a token.
type Stats struct {
	WorkerPID  int           // 0: none runs
	Generation uint64        // workers started so far
	Sessions   int           // of the current worker
	Breaker    string        // "closed": calls are tried; "open": refused at once
	Signatures uint64        // released
	Failures   uint64        // failed attempts, those included that a retry made good
	LastError  string        // of the last failed attempt
	Latency    time.Duration // moving average of one signature, verification included
}

// Open opens the token that uri names, and logs in. The module and the PIN's
// source come from the options or from the URI.
func Open(uri string, o Options) (*Token, error) {
	if !supported {
		return nil, ErrUnsupported
	}
	u, err := ParseURI(uri)
	if err != nil {
		return nil, err
	}
	if o.Module == "" {
		o.Module = u.Module
	}
	if o.PINSource == "" {
		o.PINSource = u.PINSource
	}
	switch {
	case o.Module == "":
		return nil, errors.New("opening a token: no module: the URI needs ?module-path=/path/of/the/module.so")
	case o.PINSource == "":
		return nil, errors.New("opening a token: no PIN source: the URI needs pin-source=file:/path")
	case u.Token == "" && u.Serial == "":
		return nil, errors.New("opening a token: the URI must name it by token= or serial=")
	case o.Sessions < 0 || o.Sessions > maxSessions:
		return nil, fmt.Errorf("opening a token: %d sessions: 1 to %d are allowed", o.Sessions, maxSessions)
	}
	if _, err := os.Stat(o.Module); err != nil {
		return nil, fmt.Errorf("opening a token: PKCS#11 module: %w", err)
	}
	if o.Timeout <= 0 {
		o.Timeout = defaultTimeout
	}
	if o.Sessions == 0 {
		o.Sessions = defaultSessions
	}
	if len(o.Worker) == 0 {
		self, err := os.Executable()
		if err != nil {
			return nil, err
		}
		o.Worker = []string{self, "hsm-worker"}
	}
	t := &Token{uri: u, opt: o, now: time.Now}
	if t.pin, err = ReadPIN(o.PINSource, o.Unseal); err != nil {
		return nil, err
	}
	t.stop, t.end = context.WithCancel(context.Background())
	ctx, cancel := context.WithTimeout(t.stop, o.Timeout)
	defer cancel()
	if _, err := t.acquire(ctx); err != nil {
		_ = t.Close()
		return nil, err
	}
	return t, nil
}

// Close ends the worker. Calls under way fail.
func (t *Token) Close() error {
	t.end()
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.child != nil {
		t.child.kill()
		t.child = nil
	}
	t.fatal = ErrClosed
	return nil
}

// EndWorker ends the worker, and the next call starts another: for a process
// that confines itself, whose worker must be confined too.
func (t *Token) EndWorker() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if c := t.child; c != nil {
		t.child = nil
		c.kill()
	}
}

// StartWorker starts a worker if none runs.
func (t *Token) StartWorker() error {
	ctx, cancel := context.WithTimeout(t.stop, t.opt.Timeout)
	defer cancel()
	_, err := t.acquire(ctx)
	return err
}

// Stats returns a snapshot.
func (t *Token) Stats() Stats {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := t.stats
	s.Generation, s.Breaker = t.generation, "closed"
	if t.child != nil {
		s.WorkerPID = t.child.cmd.Process.Pid
	}
	if t.failures >= breakAfter && t.now().Before(t.notBefore) {
		s.Breaker = "open"
	}
	return s
}

// acquire returns the running worker, or starts one: one caller starts it, the
// others wait.
func (t *Token) acquire(ctx context.Context) (*child, error) {
	for {
		t.mu.Lock()
		if t.fatal != nil {
			defer t.mu.Unlock()
			return nil, t.fatal
		}
		if c := t.child; c != nil {
			select {
			case <-c.gone:
				t.retireLocked(c, ErrWorker)
			default:
				t.mu.Unlock()
				return c, nil
			}
		}
		var wait <-chan struct{}
		pause := t.notBefore.Sub(t.now())
		switch {
		case t.starting != nil:
			wait, pause = t.starting, maxPause
		case pause <= 0:
			return t.start(ctx) // unlocks
		case t.failures >= breakAfter:
			defer t.mu.Unlock()
			return nil, fmt.Errorf("%w after %d failures in a row, the last: %s; next try in %v", ErrUnavailable, t.failures, t.stats.LastError, pause.Round(time.Millisecond))
		}
		t.mu.Unlock()
		timer := time.NewTimer(pause)
		select {
		case <-wait:
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return nil, fmt.Errorf("%w: waiting for a worker", ErrDeadline)
		}
		timer.Stop()
	}
}

// start starts a worker and opens the token in it. It is called with t.mu held
// and releases it.
func (t *Token) start(ctx context.Context) (*child, error) {
	done := make(chan struct{})
	t.starting = done
	t.generation++
	generation := t.generation
	t.mu.Unlock()

	// Others wait for this start, so it is not bound to one caller's patience.
	octx, cancel := context.WithTimeout(t.stop, t.opt.Timeout)
	defer cancel()
	c, err := startChild(t.opt.Worker, t.opt.Env, generation)
	var a *response
	if err == nil {
		a, err = c.call(octx, request{Op: opOpen, Open: &openBody{Module: t.opt.Module, Token: t.uri.Token, Serial: t.uri.Serial,
			Maker: t.uri.Manufacturer, Model: t.uri.Model, PIN: t.pin.value, Sessions: t.opt.Sessions}})
		if err != nil {
			c.kill()
		}
	}

	t.mu.Lock()
	defer t.mu.Unlock()
	t.starting = nil
	close(done)
	if err != nil {
		if octx.Err() != nil {
			err = fmt.Errorf("%w: opening the token", ErrDeadline)
		}
		t.failLocked(err)
		if errors.Is(err, ErrPIN) && t.fatal == nil {
			t.fatal = fmt.Errorf("%w and is not asked again: %w", ErrPIN, err)
		}
		return nil, fmt.Errorf("opening the token: %w", err)
	}
	if t.fatal != nil { // closed meanwhile
		c.kill()
		return nil, t.fatal
	}
	t.child, t.stats.Sessions = c, a.Sessions
	return c, nil
}

// retire ends a worker that failed; of several callers that saw it fail, the
// first one counts.
func (t *Token) retire(c *child, why error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.retireLocked(c, why)
}

func (t *Token) retireLocked(c *child, why error) {
	if t.child != c {
		return
	}
	t.child = nil
	c.kill()
	t.failLocked(why)
}

func (t *Token) failLocked(why error) {
	t.stats.Failures++
	t.stats.LastError = why.Error()
	t.failures++
	if t.failures > 1 { // the first restart is at once
		t.notBefore = t.now().Add(min(firstPause<<min(t.failures-2, 10), maxPause))
	}
}

// do runs one operation in a worker, with the call's deadline, and once more
// in a new worker where the error calls for it. prepare, which may be nil, runs
// before it in the same worker; check may refuse the answer.
func (t *Token) do(q request, prepare func(context.Context, *child) error, check func(*response) error) (*response, error) {
	patience := t.opt.Timeout
	if q.Op == opGenerate {
		patience *= generatePatience
	}
	var last error
	for range 2 {
		ctx, cancel := context.WithTimeout(t.stop, patience)
		a, again, err := t.once(ctx, q, prepare, check)
		cancel()
		if err == nil {
			return a, nil
		}
		if last = err; !again {
			break
		}
	}
	return nil, last
}

func (t *Token) once(ctx context.Context, q request, prepare func(context.Context, *child) error, check func(*response) error) (_ *response, again bool, _ error) {
	c, err := t.acquire(ctx)
	if err != nil {
		return nil, false, err
	}
	var a *response
	if prepare != nil {
		err = prepare(ctx, c)
	}
	if err == nil {
		a, err = c.call(ctx, q)
	}
	if err == nil && check != nil {
		err = check(a)
	}
	if err == nil {
		c.good()
		return a, false, nil
	}
	code, isCode := errors.AsType[*CodeError](err)
	switch {
	case ctx.Err() != nil && t.stop.Err() == nil:
		err = fmt.Errorf("%w: %s", ErrDeadline, q.Op)
		t.retire(c, err)
		return nil, false, err // the caller has waited long enough
	case t.stop.Err() != nil:
		return nil, false, ErrClosed
	case errors.Is(err, ErrWorker), errors.Is(err, ErrWrongSignature), isCode && (classify(code.Code) == classSession || classify(code.Code) == classDevice):
		t.retire(c, err)
		return nil, q.Op != opGenerate, err // a second key would be one too many
	case isCode && classify(code.Code) == classThrottle:
		if c.throttled() {
			t.retire(c, err)
		}
		return nil, q.Op != opGenerate, err
	}
	return nil, false, err
}

// good forgets the throttled answers before it.
func (c *child) good() {
	c.mu.Lock()
	c.throttle = 0
	c.mu.Unlock()
}

// throttled counts an answer that may mean a busy device, and says whether
// there were too many to believe that.
func (c *child) throttled() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.throttle++
	return c.throttle >= throttleLimit
}

// released records a verified signature.
func (t *Token) released(d time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.failures = 0
	t.stats.Signatures++
	if t.stats.Latency == 0 {
		t.stats.Latency = d
	}
	t.stats.Latency += (d - t.stats.Latency) / 16
}

// GenerateKey makes a key in the token, under a CKA_ID of its own if id is
// empty, and refuses it unless its attributes read back as they must.
func (t *Token) GenerateKey(a Algorithm, label string, id []byte) (*Key, error) {
	if len(id) == 0 {
		id = make([]byte, 16)
		_, _ = rand.Read(id) // never fails
	}
	r, err := t.do(request{Op: opGenerate, Key: id, Label: label, Algorithm: a}, nil, nil)
	if err != nil {
		return nil, fmt.Errorf("generating a key: %w", err)
	}
	return t.keyOf(r)
}

// Key returns the key with this CKA_ID. It is refused where its attributes do
// not say that it never left the token (an *AttributeError), or where it does
// not sign for its public key.
func (t *Token) Key(id []byte) (*Key, error) {
	if len(id) == 0 || len(id) > maxID {
		return nil, fmt.Errorf("a CKA_ID of 1 to %d bytes is expected", maxID)
	}
	r, err := t.do(request{Op: opFind, Key: id}, nil, nil)
	if err != nil {
		return nil, fmt.Errorf("key %x: %w", id, err)
	}
	return t.keyOf(r)
}

// List returns what the token says of its private keys, refused ones included.
func (t *Token) List() ([]Attributes, error) {
	r, err := t.do(request{Op: opList}, nil, nil)
	if err != nil {
		return nil, err
	}
	return r.Keys, nil
}

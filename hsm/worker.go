//go:build cgo

package hsm

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"

	"github.com/ThalesGroup/crypto11"
	"github.com/miekg/pkcs11"
	"golang.org/x/sys/unix"
)

const supported = true

// worker is the child's side: one module, one token, some sessions.
type worker struct {
	c11   *crypto11.Context // logs in, and generates keys
	p11   *pkcs11.Ctx       // signs, finds and reads
	slot  uint
	mu    sync.Mutex
	found map[string]found // by CKA_ID
	write sync.Mutex
	conn  net.Conn
}

// found is a private key that was looked up in this process.
type found struct {
	handle pkcs11.ObjectHandle
	kind   uint // CKK_...
}

// RunWorker serves the protocol on the socket f until it is closed. The
// process then ends at once, also where the module hangs in a call.
func RunWorker(f *os.File) error {
	// Modules crash, and this process has the PIN: no core, and no reading by others.
	if err := errors.Join(unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}), unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0)); err != nil {
		return fmt.Errorf("hsm worker: %w", err)
	}
	conn, err := net.FileConn(f)
	if err != nil {
		return fmt.Errorf("hsm worker: it is started by another inkan process only: %w", err)
	}
	_ = f.Close()
	w := &worker{conn: conn, found: map[string]found{}}
	r := bufio.NewReader(conn)
	var first request
	if err := readFrame(r, &first); err != nil {
		return err
	}
	if first.Op != opOpen || first.Open == nil {
		return errors.New("hsm worker: the first request must open the token")
	}
	gone := make(chan error, 1)
	work := make(chan request, 1024)
	go func() { // reads on while the module works, so that the parent's end is seen
		for {
			var q request
			if err := readFrame(r, &q); err != nil {
				gone <- err
				return
			}
			select {
			case work <- q:
			default:
				w.reply(response{ID: q.ID, Error: "the worker's queue is full"})
			}
		}
	}()
	go func() {
		sessions, err := w.open(first.Open)
		if err != nil {
			w.reply(failed(first.ID, err))
			return
		}
		for _, s := range sessions {
			go func() { // a session belongs to one goroutine: sharing crashes modules
				for q := range work {
					w.reply(w.serve(s, &q))
				}
			}()
		}
		w.reply(response{ID: first.ID, Sessions: len(sessions)})
	}()
	<-gone
	os.Exit(0) // no C_Finalize: it may hang, and the sessions end with the process
	return nil
}

func (w *worker) reply(r response) {
	w.write.Lock()
	defer w.write.Unlock()
	if err := writeFrame(w.conn, &r); err != nil {
		os.Exit(1) // nobody listens any more
	}
}

// errMissing: no key, or several, under a CKA_ID.
var errMissing = errors.New("no such key")

func failed(id uint64, err error) response {
	if code, ok := errors.AsType[pkcs11.Error](err); ok {
		return response{ID: id, Code: uint(code)}
	}
	return response{ID: id, Missing: errors.Is(err, errMissing), Error: err.Error()}
}

// open loads the module, logs in and opens the sessions. Login is per
// application (PKCS#11 v2.40, section 5.6): crypto11's serves these sessions as
// well, but for modules that take the two for two applications.
func (w *worker) open(o *openBody) ([]pkcs11.SessionHandle, error) {
	// crypto11 takes the first token with a label or a serial number, and must be
	// the first to use the module. The PIN waits until it is known which token is meant.
	cfg := &crypto11.Config{Path: o.Module, LoginNotSupported: true, MaxSessions: 2}
	if o.Serial != "" {
		cfg.TokenSerial = o.Serial
	} else {
		cfg.TokenLabel = o.Token
	}
	first, err := crypto11.Configure(cfg)
	if err != nil {
		return nil, err
	}
	if w.p11 = pkcs11.New(o.Module); w.p11 == nil { // loaded already: counts a reference
		return nil, errors.New("the module cannot be loaded")
	}
	// Most modules are initialised once in a process; p11-kit's gives each user
	// an instance of its own, with its own login.
	if err := w.p11.Initialize(); err != nil && !errors.Is(err, pkcs11.Error(pkcs11.CKR_CRYPTOKI_ALREADY_INITIALIZED)) {
		return nil, err
	}
	slots, err := w.p11.GetSlotList(true)
	if err != nil {
		return nil, err
	}
	matching := 0
	var max uint
	for _, s := range slots {
		info, err := w.p11.GetTokenInfo(s)
		if err != nil {
			continue // another slot's trouble is not ours; ours would not match
		}
		same := func(want, got string) bool { return want == "" || want == got }
		if same(o.Token, info.Label) && same(o.Serial, info.SerialNumber) && same(o.Maker, info.ManufacturerID) && same(o.Model, info.Model) {
			w.slot, max = s, info.MaxRwSessionCount
			matching++
		}
	}
	if matching != 1 {
		return nil, fmt.Errorf("%d tokens match the URI, exactly one must", matching)
	}
	slot := int(w.slot)
	if w.c11, err = crypto11.Configure(&crypto11.Config{Path: o.Module, SlotNumber: &slot, Pin: o.PIN, MaxSessions: 2}); err != nil {
		return nil, err
	}
	if err := first.Close(); err != nil {
		return nil, err
	}
	n := o.Sessions
	if max != pkcs11.CK_EFFECTIVELY_INFINITE && max != pkcs11.CK_UNAVAILABLE_INFORMATION && max > 3 {
		n = min(n, int(max)-2) // crypto11 holds two
	}
	var list []pkcs11.SessionHandle
	for range n {
		s, err := w.p11.OpenSession(w.slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
		if err != nil {
			if len(list) > 0 {
				break // as many as the token has
			}
			return nil, err
		}
		list = append(list, s)
	}
	if err := w.p11.Login(list[0], pkcs11.CKU_USER, o.PIN); err != nil && !errors.Is(err, pkcs11.Error(pkcs11.CKR_USER_ALREADY_LOGGED_IN)) {
		return nil, err
	}
	return list, nil
}

func (w *worker) serve(s pkcs11.SessionHandle, q *request) response {
	r := response{ID: q.ID}
	var err error
	switch q.Op {
	case opFind:
		r.Keys, err = w.find(s, q.Key)
	case opList:
		r.Keys, err = w.list(s)
	case opGenerate:
		r.Keys, err = w.generate(s, q)
	case opInfo:
		r.Info, err = w.info()
	case opSign:
		r.Signature, err = w.sign(s, q)
	default:
		err = fmt.Errorf("unknown operation %.16q", q.Op)
	}
	if err != nil {
		return failed(q.ID, err)
	}
	return r
}

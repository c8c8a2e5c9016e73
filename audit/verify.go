package audit

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"runtime"
	"sync"
	"time"

	"golang.org/x/mod/sumdb/tlog"

	"inkan/internal/certext"
	"inkan/internal/jws"
	"inkan/internal/sqlite"
	"inkan/scope"
)

// Report says what verification proved about a record, or a part of one.
type Report struct {
	Agent        string      `json:"agent"`
	Entries      uint64      `json:"entries"` // that were verified
	Permits      uint64      `json:"permits"`
	Denials      uint64      `json:"denials"`
	Events       uint64      `json:"events"`
	Signed       uint64      `json:"signed"`       // permits whose signature is there and verifies
	Unsigned     []uint64    `json:"unsigned"`     // counters of permits without one, the first hundred
	Certificates int         `json:"certificates"` // under which entries stand
	First        time.Time   `json:"first,omitzero"`
	Last         time.Time   `json:"last,omitzero"`
	Root         string      `json:"root"`            // of the Merkle tree, hex; of an export: its head's
	Head         *Checkpoint `json:"head,omitempty"`  // the latest that the device signed
	After        uint64      `json:"after,omitempty"` // entries that follow that head
	Filter       *Filter     `json:"filter,omitempty"`
	Claims       []Claim     `json:"claims"`
}

// Claim is a sentence about a record that verification proved, or did not.
type Claim struct {
	Name   string `json:"claim"` // stable; docs/record.md lists them
	Proven bool   `json:"proven"`
	Text   string `json:"text"`
}

// Rule is the stable name of why something does not verify. docs/record.md
// has a sentence for each.
type Rule string

// The rules.
const (
	RuleForm          Rule = "form"           // a line, an entry or the file is malformed
	RuleCertificate   Rule = "certificate"    // it is missing, malformed, or not the CA's
	RuleAgent         Rule = "agent"          // an entry, a certificate or a head of another agent
	RuleStatement     Rule = "statement"      // the statement is malformed
	RuleMissing       Rule = "missing"        // a number is missing
	RuleOrder         Rule = "order"          // numbers, predecessors or times are out of order
	RuleStart         Rule = "start"          // a start document is missing, or says something else
	RuleTime          Rule = "time"           // a permit outside the life of its certificate
	RuleScope         Rule = "scope"          // a permit that its scope does not allow
	RuleUtilisation   Rule = "utilisation"    // it states something else than the entries lead to
	RuleEvent         Rule = "event"          // an event that may not stand where it does
	RuleSignature     Rule = "signature"      // not by the certified key over exactly the entry
	RuleHead          Rule = "head"           // the head does not belong to the entries
	RuleHeadKey       Rule = "head_key"       // the head is not by a key that the CA certified for the agent
	RuleHeadSignature Rule = "head_signature" // the head's signature does not verify
	RuleProof         Rule = "proof"          // an entry is not in the tree under the head, at its place
	RuleFields        Rule = "fields"         // an export's fields say something else than the statement
	RuleFilter        Rule = "filter"         // an export's entry is not what its filter selects
	RuleTruncated     Rule = "truncated"      // entries or lines are missing at the end
)

// Unproven says which entry does not verify, and why.
type Unproven struct {
	Rule    Rule
	Counter uint64 // 0: the record as a whole
	Reason  string
}

func (u *Unproven) Error() string {
	if u.Counter == 0 {
		return fmt.Sprintf("the record does not verify: %s (%s)", u.Reason, u.Rule)
	}
	return fmt.Sprintf("the record does not verify at entry %d: %s (%s)", u.Counter, u.Reason, u.Rule)
}

func unproven(rule Rule, counter uint64, format string, a ...any) error {
	return &Unproven{rule, counter, fmt.Sprintf(format, a...)}
}

// VerifyOptions are what verification needs beside the record.
type VerifyOptions struct {
	Roots    *x509.CertPool             // the CA's
	Progress func(done, total uint64)   // may be nil; told how far it is
	Observe  func(*Verified)            // may be nil; gets each entry that verified, in order, from one goroutine
	Head     func(*Checkpoint, *Filter) // may be nil; gets the head before the entries of an export

	Sizes  map[uint64]bool                      // of a whole record: numbers of entries for which
	RootAt func(size uint64, root scope.Digest) // this gets the root of the tree over them
}

// Verified is an entry that was verified.
type Verified struct {
	Entry       Entry
	Statement   *scope.Statement
	Certificate *certext.ActionCertificate
	Scope       *scope.Scope
	Start       *scope.StartDocument // of the process that asked; nil where it was not confined
	Context     bool                 // it shows what stands beside a period, and is not in it
}

// VerifyFile checks a log file against the CA's roots. It reads a snapshot, so
// a signer may be writing. Its error is an [*Unproven] when the record is
// wrong, and another one when it could not be read.
func VerifyFile(ctx context.Context, path string, o VerifyOptions) (*Report, error) {
	r, err := verifyFile(ctx, path, o)
	return r, formed(err)
}

// formed turns an error of what is in a file into that of a file that does not
// verify. Others, such as of the disk, stay what they are.
func formed(err error) error {
	if err == nil || errors.Is(err, errVersion) || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	if _, ok := errors.AsType[*Unproven](err); ok {
		return err
	}
	if _, ok := errors.AsType[*fs.PathError](err); ok {
		return err
	}
	if failed, damaged := sqlite.Failed(err); failed && !damaged {
		return err
	}
	return unproven(RuleForm, 0, "%v", err)
}

func verifyFile(ctx context.Context, path string, o VerifyOptions) (*Report, error) {
	s, err := OpenSnapshot(ctx, path)
	if err != nil {
		return nil, err
	}
	defer s.Close()
	v := newVerification(o)
	if v.stored, err = s.chains(ctx); err != nil {
		return nil, err
	}
	if v.starts, err = s.starts(ctx); err != nil {
		return nil, err
	}
	if v.heads, err = s.checkpoints(ctx); err != nil {
		return nil, err
	}
	if err := v.sealed(0); err != nil {
		return nil, err
	}
	source := func(yield func(*job, error) bool) {
		for e, err := range s.Entries(ctx) {
			if !yield(&job{entry: e}, err) {
				return
			}
		}
	}
	if err := v.run(ctx, source, s.Head.Size, v.next); err != nil {
		return nil, err
	}
	return v.finish(s.Head)
}

// verification walks over a record once. What one entry shows alone is checked
// on all cores; order, chain, tree and sums entry by entry, in order.
type verification struct {
	o      VerifyOptions
	stored map[[32]byte][]byte // chains, by the SHA-256 of their leaf
	starts map[[32]byte][]byte // start documents, by their SHA-256
	heads  map[uint64]string   // signed checkpoints by size

	mu           sync.Mutex // guards what follows, and of an export stored and starts
	certificates map[scope.Digest]*certificate
	started      map[scope.Run]*scope.StartDocument // those that were checked

	report   *Report
	used     map[scope.Digest]bool
	previous [32]byte
	last     time.Time
	tree     []tlog.Hash // complete subtrees, the largest first
	book     *scope.Book // what is used of limits over time
}

func newVerification(o VerifyOptions) *verification {
	return &verification{o: o, report: &Report{Unsigned: []uint64{}}, certificates: make(map[scope.Digest]*certificate), started: make(map[scope.Run]*scope.StartDocument), used: make(map[scope.Digest]bool), book: scope.NewBook()}
}

// certificate is one that chains to the CA.
type certificate struct {
	action *certext.ActionCertificate
	scope  *scope.Scope
	alg    string
}

// job is an entry on its way through verification.
type job struct {
	entry   Entry
	line    *exportLine // of an export, else nil
	raw     []byte      // of an export: the line's bytes, not parsed yet
	section *section

	statement *scope.Statement
	cert      *certificate
	start     *scope.StartDocument
	permit    *scope.Permit // nil: the entry is no permit
	err       error
	done      chan struct{}
}

// run prepares jobs on all cores and hands them to next in their order.
func (v *verification) run(ctx context.Context, source iter.Seq2[*job, error], total uint64, next func(*job) error) error {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	work, order := make(chan *job, 128), make(chan *job, 256)
	var failed error // the source's; read after order was closed
	wg.Go(func() {
		defer close(order)
		defer close(work)
		for j, err := range source {
			if err != nil {
				failed = err
				return
			}
			j.done = make(chan struct{})
			select {
			case work <- j:
			case <-ctx.Done():
				return
			}
			select {
			case order <- j:
			case <-ctx.Done():
				return
			}
		}
	})
	for range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			for j := range work {
				j.err = v.prepare(j)
				close(j.done)
			}
		})
	}
	done := uint64(0)
	for j := range order {
		<-j.done
		if err := next(j); err != nil {
			return v.which(err, order)
		}
		if done++; v.o.Progress != nil && (done%1024 == 0 || done == total) {
			v.o.Progress(done, total)
		}
	}
	if failed == nil {
		failed = ctx.Err()
	}
	return failed
}

// which tells an entry that is missing from one that stands in a wrong place.
func (v *verification) which(err error, rest <-chan *job) error {
	u, ok := errors.AsType[*Unproven](err)
	if !ok || u.Rule != RuleMissing || u.Counter != 0 {
		return err
	}
	want := v.report.Entries + 1
	for j := range rest {
		if <-j.done; j.entry.Counter == want {
			return unproven(RuleOrder, want, "it stands after later ones")
		}
	}
	return unproven(RuleMissing, want, "it is missing, later ones are there")
}

// prepare checks what an entry shows alone.
func (v *verification) prepare(j *job) error {
	if j.raw != nil {
		if err := j.parse(); err != nil {
			return err
		}
	}
	e := &j.entry
	st, err := scope.ParseStatement(e.Statement)
	if err != nil {
		return unproven(RuleStatement, e.Counter, "%v", err)
	}
	j.statement = st
	if j.line != nil {
		e.Counter = uint64(st.Counter)
	} else if uint64(st.Counter) != e.Counter {
		return unproven(RuleOrder, e.Counter, "the statement says it is number %d", st.Counter)
	}
	if j.cert, err = v.certificate(st.Decision.Certificate); err != nil {
		return unproven(RuleCertificate, e.Counter, "%v", err)
	}
	if j.start, err = v.start(st); err != nil {
		return unproven(RuleStart, e.Counter, "%v", err)
	}
	if err := v.signed(j); err != nil {
		return err
	}
	if j.line != nil {
		return j.proven()
	}
	return nil
}

// next checks an entry of a whole record in its place.
func (v *verification) next(j *job) error {
	r, n := v.report, j.entry.Counter
	want := r.Entries + 1
	switch {
	case n > want && j.statement != nil:
		return &Unproven{Rule: RuleMissing} // which says more
	case j.err != nil:
		return j.err
	case n != want:
		return unproven(RuleOrder, n, "entry %d is expected here", want)
	}
	if err := v.follows(j); err != nil {
		return err
	}
	v.grow(j.entry.Statement)
	if v.o.Sizes[n] {
		v.o.RootAt(n, scope.Digest(v.root()))
	}
	st := j.statement
	if st.Controls != v.book.Lasting() {
		return unproven(RuleOrder, n, "it names event %d as the last one that lasts, that is %d", st.Controls, v.book.Lasting())
	}
	if open := v.book.OpenSince(st.Time.Time); st.Open != open {
		return unproven(RuleOrder, n, "it names entry %d as the oldest open order, that is %d", st.Open, open)
	}
	switch st.Decision.Decision {
	case scope.DecisionEvent:
		if refusal := v.book.Admits(j.cert.scope, st); refusal != nil {
			return unproven(RuleEvent, n, "the event may not stand there: %v", refusal)
		}
	case scope.DecisionPermit:
		out, refusal := v.book.Decide(j.permit, st.Time.Time)
		if refusal != nil {
			return unproven(RuleScope, n, "it is out of scope: %v", refusal)
		}
		if !st.States(out) {
			return unproven(RuleUtilisation, n, "it states another policy, or another utilisation of its limits, than the entries before it lead to")
		}
	}
	v.book.Replay(st)
	v.count(j)
	return v.sealed(n)
}

// follows checks that an entry follows the one before it.
func (v *verification) follows(j *job) error {
	r, st, n := v.report, j.statement, j.entry.Counter
	switch {
	case st.Previous != scope.Digest(v.previous):
		return unproven(RuleOrder, n, "the statement names another predecessor")
	case st.Time.Time.Before(v.last):
		return unproven(RuleOrder, n, "the statement is earlier than its predecessor, or than a head before it")
	case r.Agent != "" && st.Agent != r.Agent:
		return unproven(RuleAgent, n, "the statement is of another agent, %s", st.Agent)
	}
	return nil
}

// count counts an entry that verified.
func (v *verification) count(j *job) {
	r, st := v.report, j.statement
	v.previous, v.last = sha256.Sum256(j.entry.Statement), st.Time.Time
	r.Agent = st.Agent
	beside := j.line != nil && j.line.Context
	if !beside {
		r.Entries++
		if r.First.IsZero() {
			r.First = st.Time.Time
		}
		r.Last = st.Time.Time
		v.used[st.Decision.Certificate] = true
		switch {
		case st.Decision.Decision == scope.DecisionDeny:
			r.Denials++
		case st.Decision.Decision == scope.DecisionEvent:
			r.Events++
		case j.entry.JWS == "":
			r.Permits++
			if len(r.Unsigned) < 100 {
				r.Unsigned = append(r.Unsigned, j.entry.Counter)
			}
		default:
			r.Permits++
			r.Signed++
		}
	}
	if v.o.Observe != nil {
		v.o.Observe(&Verified{j.entry, st, j.cert.action, j.cert.scope, j.start, beside})
	}
}

// grow adds a leaf to the tree: subtrees of equal size join (RFC 9162, section 2.1).
func (v *verification) grow(leaf []byte) {
	h := tlog.RecordHash(leaf)
	for n := v.report.Entries; n&1 == 1; n >>= 1 {
		h = tlog.NodeHash(v.tree[len(v.tree)-1], h)
		v.tree = v.tree[:len(v.tree)-1]
	}
	v.tree = append(v.tree, h)
}

func (v *verification) root() tlog.Hash {
	if len(v.tree) == 0 {
		return tlog.Hash(sha256.Sum256(nil))
	}
	h := v.tree[len(v.tree)-1]
	for i := len(v.tree) - 2; i >= 0; i-- {
		h = tlog.NodeHash(v.tree[i], h)
	}
	return h
}

// sealed holds the record so far against the checkpoint over n entries, if
// there is one.
func (v *verification) sealed(n uint64) error {
	note, ok := v.heads[n]
	if !ok {
		return nil
	}
	c, err := v.head(note)
	switch {
	case err != nil:
		return err
	case c.Size != n || tlog.Hash(c.Root) != v.root():
		return unproven(RuleHead, n, "the head that was signed over %d entries is not that of these entries", n)
	case c.Time.Before(v.last):
		return unproven(RuleHead, n, "the head is earlier than its last entry")
	case v.report.Agent != "" && c.Agent != v.report.Agent:
		return unproven(RuleAgent, n, "the head is of another agent, %s", c.Agent)
	}
	v.report.Agent, v.report.Head, v.last = c.Agent, c, c.Time
	return nil
}

// head verifies a signed checkpoint, but for what it is over.
func (v *verification) head(note string) (*Checkpoint, error) {
	c, err := OpenCheckpoint(note)
	if err != nil {
		return nil, unproven(RuleHead, 0, "the head: %v", err)
	}
	cert, err := v.certificate(c.Certificate)
	if err != nil {
		return nil, unproven(RuleHeadKey, 0, "the head over %d entries: %v", c.Size, err)
	}
	crt := cert.action.Certificate
	switch {
	case cert.action.Agent != c.Agent:
		return nil, unproven(RuleHeadKey, 0, "the head is of %s, its certificate of %s", c.Agent, cert.action.Agent)
	case c.Time.Before(crt.NotBefore) || c.Time.After(crt.NotAfter):
		return nil, unproven(RuleHeadKey, 0, "the head is from %s, outside the life of its certificate", c.Time.Format(time.RFC3339))
	}
	switch err := verifyNote(note, c, crt.PublicKey, cert.alg); {
	case errors.Is(err, errOtherKey):
		return nil, unproven(RuleHeadKey, 0, "%v", err)
	case err != nil:
		return nil, unproven(RuleHeadSignature, 0, "%v", err)
	}
	return c, nil
}

func (v *verification) certificate(sum scope.Digest) (*certificate, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if c, ok := v.certificates[sum]; ok {
		return c, nil
	}
	der, ok := v.stored[[32]byte(sum)]
	if !ok {
		return nil, errors.New("its certificate is not in the record")
	}
	chain, err := x509.ParseCertificates(der)
	if err != nil || len(chain) == 0 || sha256.Sum256(chain[0].Raw) != [32]byte(sum) {
		return nil, errors.New("its certificate is not the one in the record")
	}
	pool, c := x509.NewCertPool(), new(certificate)
	for _, i := range chain[1:] {
		pool.AddCert(i)
	}
	if c.action, err = certext.ParseAction(chain[0]); err != nil {
		return nil, fmt.Errorf("its certificate: %w", err)
	}
	if c.scope, err = scope.ParseCanonical(c.action.Scope); err != nil {
		return nil, fmt.Errorf("its certificate: %w", err)
	}
	if c.alg, _, err = jws.Algorithm(chain[0].PublicKey); err != nil {
		return nil, fmt.Errorf("its certificate: %w", err)
	}
	if _, err := c.action.VerifyChain(v.o.Roots, pool, chain[0].NotBefore); err != nil {
		return nil, fmt.Errorf("its certificate does not chain to the CA: %w", err)
	}
	v.certificates[sum] = c
	return c, nil
}

// start: what a statement says of the process that asked is what its start
// document in the record says. It returns that document.
func (v *verification) start(st *scope.Statement) (*scope.StartDocument, error) {
	if st.Run == nil {
		return nil, nil
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if d := v.started[*st.Run]; d != nil && d.Agent == st.Agent {
		return d, nil
	}
	b, ok := v.starts[st.Run.Start]
	if !ok {
		return nil, errors.New("its start document is not in the record")
	}
	d, err := scope.ParseStartDocument(b)
	if err != nil {
		return nil, err
	}
	run, err := d.Run()
	if err != nil {
		return nil, err
	}
	if *run != *st.Run || d.Agent != st.Agent {
		return nil, errors.New("it says another thing of its start than the start document")
	}
	v.started[*st.Run] = d
	return d, nil
}

// signed checks agent, scope, certificate at the statement's time, and the signature.
func (v *verification) signed(j *job) error {
	st, c := j.statement, j.cert
	fail := func(rule Rule, format string, a ...any) error { return unproven(rule, j.entry.Counter, format, a...) }
	switch {
	case st.Agent != c.action.Agent:
		return fail(RuleAgent, "the statement is of %s, its certificate of %s", st.Agent, c.action.Agent)
	case [32]byte(st.Decision.Scope) != c.scope.Hash():
		return fail(RuleScope, "the statement names another scope than its certificate")
	}
	if st.Decision.Decision != scope.DecisionPermit {
		if j.entry.JWS != "" {
			return fail(RuleSignature, "an entry that is no permit has a signature")
		}
		return nil
	}
	crt := c.action.Certificate
	if at := st.Time.Time; at.Before(crt.NotBefore) || at.After(crt.NotAfter) {
		return fail(RuleTime, "the statement is from %s, outside the life of its certificate", at.Format(time.RFC3339))
	}
	permit, err := scope.Check(c.scope, st.Action(), st.Env(c.action.Attestation.Time))
	if err != nil {
		return fail(RuleScope, "it is out of scope: %v", err)
	}
	if !st.StatesNotional(permit) {
		return fail(RuleScope, "it states another notional than its order has")
	}
	j.permit = permit
	if j.entry.JWS == "" {
		return nil
	}
	m, err := jws.Split([]byte(j.entry.JWS))
	if err != nil {
		return fail(RuleSignature, "%v", err)
	}
	h, err := m.Header()
	if err != nil {
		return fail(RuleSignature, "%v", err)
	}
	if !bytes.Equal(m.Payload, j.entry.Statement) {
		return fail(RuleSignature, "what was signed is not the statement")
	}
	if h.Typ != jws.Type {
		return fail(RuleSignature, "the signature's typ is %.32q", h.Typ)
	}
	if err := jws.Verify(crt.PublicKey, h.Alg, m.SigningInput, m.Signature); err != nil {
		return fail(RuleSignature, "%v", err)
	}
	return nil
}

// finish holds the walk over a whole file against the file's head.
func (v *verification) finish(head Head) (*Report, error) {
	r := v.report
	for n := range v.heads {
		if n > r.Entries {
			return nil, unproven(RuleTruncated, 0, "a head was signed over %d entries, %d are there", n, r.Entries)
		}
	}
	root := v.root()
	switch {
	case r.Entries != head.Size:
		return nil, unproven(RuleTruncated, 0, "the head says %d entries, %d are there", head.Size, r.Entries)
	case r.Entries > 0 && v.previous != head.Previous:
		return nil, unproven(RuleHead, 0, "the last entry is not the one that the head names")
	case r.Entries > 0 && root != tlog.Hash(head.Root):
		return nil, unproven(RuleHead, 0, "the entries do not lead to the head's root")
	}
	r.Root, r.Certificates = fmt.Sprintf("%x", root[:]), len(v.used)
	if r.Head != nil {
		r.After = r.Entries - r.Head.Size
	} else {
		r.After = r.Entries
	}
	r.claim("authentic", true, "Every stored signature is the certified key's, over exactly the entry; every certificate chains to this CA.")
	r.claim("in_scope", true, "Every permit was inside the scope of a certificate that was valid at its time.")
	r.claim("limits_over_time", true, "Limits over time were held: they were added up anew from the entries.")
	r.claim("in_order", true, "Entries are numbered without gaps, each names its predecessor, and times do not go back.")
	switch {
	case r.Head == nil:
		r.claim("complete", false, "That no entries were cut off at the end: the device has signed no head of this record.")
	case r.After > 0:
		r.claim("complete", true, fmt.Sprintf("The record held exactly the first %d entries at %s: the device signed that head.", r.Head.Size, r.Head.Time.Format(scope.TimeFormat)))
		r.claim("nothing_after", false, fmt.Sprintf("That nothing follows the %d entries after that head: ask the signer for a checkpoint.", r.After))
	default:
		r.claim("complete", true, fmt.Sprintf("The record held exactly these %d entries at %s: the device signed that head.", r.Head.Size, r.Head.Time.Format(scope.TimeFormat)))
		r.claim("nothing_after", false, "That nothing was done after that moment: compare with the latest signed action that a venue has, which names its number.")
	}
	v.claimRest()
	return r, nil
}

func (r *Report) claim(name string, proven bool, text string) {
	r.Claims = append(r.Claims, Claim{name, proven, text})
}

// claimRest adds what is said of any record.
func (v *verification) claimRest() {
	r := v.report
	if len(v.started) > 0 {
		r.claim("what_ran", true, "What entries say of the agent's process is what the start documents say; it is the host's word, as the signer measured it.")
	}
	if n := r.Permits - r.Signed; n > 0 {
		r.claim("all_signed", false, fmt.Sprintf("Whether the %d permits without a stored signature went out: a crash between record and reply leaves such entries; a venue knows.", n))
	}
	r.claim("not_revoked", false, "That no certificate was revoked at the time: compare with the issuer's revocation list.")
}

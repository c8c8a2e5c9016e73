package signer

import (
	"bufio"
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"inkan/internal/caller"
	"inkan/internal/problem"
	"inkan/internal/strictjson"
	"inkan/scope"
)

// StartProtocol is the name to which a launcher's connection is upgraded while
// it hands over the files that are measured: docs/confinement.md describes it.
const StartProtocol = "inkan-start"

// Bounds of a start.
const (
	maxStartRequest = 128 << 10
	maxMeasured     = 64 << 30 // bytes of all files of a start together
	startTimeout    = 10 * time.Minute
)

// StartOffer is what a launcher is told before a start.
type StartOffer struct {
	OS        string   `json:"os"`        // os section of the agent's scope, in canonical form
	Protected []string `json:"protected"` // paths of the signer that no agent may reach
}

// StartRequest is what a launcher says about a start.
type StartRequest struct {
	Agent      string       `json:"agent"`
	Executable string       `json:"executable"` // path, without symbolic links
	Files      []string     `json:"files"`      // declared files, likewise
	Args       []string     `json:"args"`
	OS         scope.Digest `json:"os"` // of the section that it confines to
	Landlock   int          `json:"landlock_abi"`
	Unenforced []string     `json:"unenforced,omitempty"`
}

// Started is the answer to a start that is allowed.
type Started struct {
	Start    scope.Digest        `json:"start"` // of the document
	Document scope.StartDocument `json:"document"`
}

// binding ties a connection to the process that a launcher became.
type binding struct {
	agent   *Agent
	run     scope.Run
	program fileID // of the executable
	files   []measured
	seccomp bool // the launcher said that it enforces a filter
}

// measured is a file of a start, held open to see whether it changes.
type measured struct {
	path string
	file *os.File
	id   fileID
}

func (b *binding) close() {
	for _, f := range b.files {
		_ = f.file.Close() // it was only read
	}
}

// launcher authenticates a process that wants to start an agent.
func (s *Signer) launcher(w http.ResponseWriter, r *http.Request, agent string) (*peer, *process, *Agent) {
	p, _ := r.Context().Value(peerKey{}).(*peer)
	if p == nil || p.bound != nil {
		s.unknown(w, r, "only a launcher on this host starts agents", nil)
		return nil, nil, nil
	}
	if !s.alone(w, r, p) {
		return nil, nil, nil
	}
	who, err := p.describe(&s.digests, true)
	if err != nil {
		s.unknown(w, r, err.Error(), nil)
		return nil, nil, nil
	}
	if !s.config.launches(who, agent) {
		s.unknown(w, r, fmt.Sprintf("no caller of agent %.64q that is a launcher includes it", agent), who)
		return nil, nil, nil
	}
	// Whoever traces the launcher could make it start anything in any way.
	if st, err := p.status(); err != nil || st["TracerPid"] != "0" {
		s.unknown(w, r, "the launcher is being traced", who)
		return nil, nil, nil
	}
	a := s.agents[agent]
	if a.current.Load() == nil {
		s.fail(w, &scope.Refusal{Rule: RuleNoCertificate, Message: "the agent has no certificate yet"})
		return nil, nil, nil
	}
	return p, who, a
}

func (s *Signer) offer(w http.ResponseWriter, r *http.Request) {
	_, _, a := s.launcher(w, r, r.PathValue("agent"))
	if a == nil {
		return
	}
	o := a.current.Load().scope.OS()
	if o == nil {
		s.fail(w, &scope.Refusal{Rule: scope.RuleOS, Message: "the agent's scope has no os section, so nothing can be started under it"})
		return
	}
	b, err := o.Canonical()
	if err != nil {
		s.fail(w, err)
		return
	}
	problem.JSON(w, http.StatusOK, StartOffer{OS: string(b), Protected: s.config.protected()})
}

// protected are the paths that no agent may reach.
func (c *Config) protected() []string {
	out := []string{c.StateDir, c.Socket, c.TPM}
	for _, p := range []string{c.OwnerAuthFile, c.EndorsementF} {
		if p != "" {
			out = append(out, p)
		}
	}
	if c.Remote != nil {
		out = append(out, c.Remote.Key)
	}
	for _, a := range c.Agents {
		if a.ReferencePrices != "" {
			out = append(out, a.ReferencePrices)
		}
		if a.Policy != "" {
			out = append(out, a.Policy)
		}
		for _, uri := range []string{a.Key, a.TLSKey} {
			// RFC 7512: the PIN's file is in the query of the URI.
			_, query, _ := strings.Cut(uri, "?")
			for part := range strings.SplitSeq(query, "&") {
				name, value, _ := strings.Cut(part, "=")
				if path, err := url.PathUnescape(value); name == "pin-source" && err == nil {
					path = strings.TrimPrefix(path, "file:")
					if strings.HasPrefix(path, "/") {
						out = append(out, path)
					}
				}
			}
		}
	}
	return out
}

// start serves POST /v1/starts. It answers 101, takes the files by descriptor,
// measures them, decides, answers again, and then the connection is the agent's.
func (s *Signer) start(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(io.LimitReader(r.Body, maxStartRequest+1))
	if err != nil {
		problem.Write(w, problem.Problem{Status: http.StatusBadRequest, Detail: "the request's body could not be read"})
		return
	}
	var req StartRequest
	if err := strictjson.Unmarshal(body, maxStartRequest, &req); err != nil {
		problem.Write(w, problem.Problem{Status: http.StatusBadRequest, Detail: "start: " + err.Error()})
		return
	}
	if r.Header.Get("Upgrade") != StartProtocol {
		problem.Write(w, problem.Problem{Status: http.StatusUpgradeRequired, Detail: "a start upgrades the connection to " + StartProtocol})
		return
	}
	p, who, a := s.launcher(w, r, req.Agent)
	if a == nil {
		return
	}
	conn, rw, err := http.NewResponseController(w).Hijack()
	if err != nil {
		s.fail(w, err)
		return
	}
	c := conn.(*callerConn)
	if err := s.upgrade(r.Context(), c, rw, p, who, a, &req); err != nil {
		s.log.WarnContext(r.Context(), "an agent was not started", "agent", a.name, "pid", p.PID, "error", err)
		_ = c.Close() // the launcher has its answer, or is gone
	}
}

func (s *Signer) upgrade(ctx context.Context, c *callerConn, rw *bufio.ReadWriter, p *peer, who *process, a *Agent, req *StartRequest) error {
	if rw.Reader.Buffered() > 0 {
		return errors.New("the launcher sent more before it was asked to")
	}
	if err := c.SetDeadline(time.Now().Add(startTimeout)); err != nil {
		return err
	}
	if _, err := io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: "+StartProtocol+"\r\n\r\n"); err != nil {
		return err
	}
	files, err := c.receive(1 + len(req.Files))
	b := &binding{agent: a}
	for i, f := range files { // they are closed in any case
		path := req.Executable
		if i > 0 {
			path = req.Files[i-1]
		}
		b.files = append(b.files, measured{path: path, file: f})
	}
	doc, err := s.bind(ctx, b, p, who, req, err)
	answer := &answer{header: make(http.Header)}
	if err != nil {
		b.close()
		s.fail(answer, err)
		return errors.Join(err, answer.send(c))
	}
	problem.JSON(answer, http.StatusOK, Started{Start: b.run.Start, Document: *doc})
	p.bound = b
	if err := answer.send(c); err != nil {
		return err
	}
	if err := c.SetDeadline(time.Time{}); err != nil {
		return err
	}
	s.log.InfoContext(ctx, "an agent was started", "agent", a.name, "pid", p.PID, "executable", doc.Executable.Path, "sha256", doc.Executable.SHA256, "start", hex.EncodeToString(b.run.Start[:]))
	if err := c.endsWith(p); err != nil {
		return err
	}
	return s.bound.add(c)
}

// bind measures a start and holds it against the scope.
func (s *Signer) bind(ctx context.Context, b *binding, p *peer, who *process, req *StartRequest, received error) (*scope.StartDocument, error) {
	bad := func(format string, v ...any) error {
		return &scope.Refusal{Rule: scope.RuleForm, Message: fmt.Sprintf(format, v...)}
	}
	if received != nil {
		return nil, bad("the files did not arrive: %v", received)
	}
	cred := b.agent.current.Load()
	doc := &scope.StartDocument{Version: 1, Agent: cred.action.Agent, Files: []scope.StartFile{}, Args: req.Args, UID: who.UID, Unit: who.Unit, OS: req.OS, Landlock: req.Landlock, Unenforced: req.Unenforced,
		Launcher: hex.EncodeToString(who.Executable[:])}
	var total int64
	for i := range b.files {
		f := &b.files[i]
		fi, err := f.file.Stat()
		if err != nil {
			return nil, err
		}
		if total += fi.Size(); !fi.Mode().IsRegular() || total > maxMeasured {
			return nil, bad("%.128s is not a regular file, or the files have more than %d bytes", f.path, int64(maxMeasured))
		}
		sum, id, err := s.digests.ofFile(f.file)
		if err != nil {
			return nil, bad("%.128s cannot be measured: %v", f.path, err)
		}
		f.id = id
		entry := scope.StartFile{Path: f.path, SHA256: hex.EncodeToString(sum[:])}
		if i == 0 {
			doc.Executable = entry
			b.program = f.id
			continue
		}
		doc.Files = append(doc.Files, entry)
	}
	slices.SortFunc(doc.Files, func(x, y scope.StartFile) int { return strings.Compare(x.Path, y.Path) })
	if err := scope.ValidFiles(append(slices.Clone(doc.Files), doc.Executable)); err != nil {
		return nil, bad("%v", err)
	}
	b.seccomp = !slices.Contains(req.Unenforced, "syscalls")
	text, err := doc.Marshal()
	if err != nil {
		return nil, bad("%v", err)
	}
	run, err := doc.Run()
	if err != nil {
		return nil, err
	}
	b.run = *run
	if err := b.agent.log.AddStart(ctx, text); err != nil {
		return nil, err
	}
	o := cred.scope.OS()
	if o == nil {
		return nil, b.agent.refuse(ctx, nil, &scope.Refusal{Rule: scope.RuleOS, Message: "the agent's scope has no os section, so nothing can be started under it"}, cred, run)
	}
	if r := o.Refuses(run); r != nil {
		return nil, b.agent.refuse(ctx, nil, r, cred, run)
	}
	if !p.Alive() {
		return nil, caller.ErrGone
	}
	return doc, nil
}

// check says why the process at the other end is not the one that was started,
// or not as it was; nil if it is.
func (b *binding) check(p *peer) error {
	st, err := p.status()
	if err != nil && !errors.Is(err, caller.ErrGone) {
		return &inside{"its state could not be read", err}
	} else if err != nil {
		return err
	}
	var runs unix.Stat_t
	if err := unix.Stat(fmt.Sprintf("/proc/%d/exe", p.PID), &runs); err != nil {
		return &inside{"its executable could not be read", err}
	}
	now := idOf(&runs)
	switch {
	case !p.Alive():
		return caller.ErrGone
	case now.dev != b.program.dev || now.ino != b.program.ino: // while it runs its content cannot change (ETXTBSY)
		return &scope.Refusal{Rule: scope.RuleStart, Message: "the process does not run the executable that was measured"}
	case st["NoNewPrivs"] != "1", b.seccomp && st["Seccomp"] != "2":
		return &scope.Refusal{Rule: scope.RuleOS, Message: "the process is not confined as its launcher said"}
	case st["TracerPid"] != "0":
		return &scope.Refusal{Rule: scope.RuleOS, Message: "the process is being traced by process " + st["TracerPid"]}
	}
	for _, f := range b.files[1:] {
		if now, err := identityOf(f.file); err != nil || now != f.id {
			return &scope.Refusal{Rule: scope.RuleStart, Field: "run.files", Value: f.path, Message: f.path + " was changed or replaced after the start: start the agent again"}
		}
	}
	return nil
}

// status is /proc/PID/status of the process.
func (p *peer) status() (map[string]string, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.PID))
	if err != nil {
		return nil, err
	}
	out := make(map[string]string)
	for line := range strings.Lines(string(b)) {
		if name, value, ok := strings.Cut(line, ":"); ok {
			out[name] = strings.TrimSpace(value)
		}
	}
	if !p.Alive() {
		return nil, caller.ErrGone
	}
	return out, nil
}

// receive takes n open files that the launcher sends in one message with one byte.
func (c *callerConn) receive(n int) (files []*os.File, err error) {
	const most = 64
	if n > most {
		return nil, fmt.Errorf("%d files, at most %d are allowed", n, most)
	}
	b := make([]byte, 1)
	oob := make([]byte, unix.CmsgSpace(unix.SizeofUcred)+unix.CmsgSpace(4*most))
	read, oobn, flags, _, err := c.ReadMsgUnix(b, oob)
	if err != nil {
		return nil, err
	}
	messages, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil {
		return nil, err
	}
	sender := int32(-1)
	for i := range messages {
		switch m := &messages[i]; m.Header.Type {
		case unix.SCM_RIGHTS:
			fds, err := unix.ParseUnixRights(m)
			if err != nil {
				return files, err
			}
			for _, fd := range fds {
				files = append(files, os.NewFile(uintptr(fd), "a file of a start"))
			}
		case unix.SCM_CREDENTIALS:
			cred, err := unix.ParseUnixCredentials(m)
			if err != nil {
				return files, err
			}
			sender = cred.Pid
		}
	}
	switch {
	case read != 1 || flags&unix.MSG_CTRUNC != 0 || len(files) != n:
		err = fmt.Errorf("one byte with %d files is expected, %d came", n, len(files))
	case c.peer == nil || sender != c.peer.PID:
		err = fmt.Errorf("process %d sent them, and the connection is not its", sender)
	}
	if err != nil {
		for _, f := range files {
			_ = f.Close() // it was not used
		}
		return nil, err
	}
	return files, nil
}

// endsWith closes the connection when the process ends, whoever else holds the
// other end by then.
func (c *callerConn) endsWith(p *peer) error {
	fd, err := unix.FcntlInt(uintptr(p.Pidfd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return err
	}
	if err := unix.SetNonblock(fd, true); err != nil { // so that waiting takes no thread
		return errors.Join(err, unix.Close(fd))
	}
	f := os.NewFile(uintptr(fd), "pidfd")
	raw, err := f.SyscallConn()
	if err != nil {
		return errors.Join(err, f.Close())
	}
	c.watch = f
	go func() {
		if raw.Read(caller.Ended) == nil {
			_ = c.Close() // nobody is left to tell
		}
	}()
	return nil
}

// boundListener hands connections of started agents to their server.
type boundListener struct {
	conns chan *callerConn
	done  chan struct{}
	once  sync.Once
	addr  net.Addr
}

func newBoundListener(addr net.Addr) *boundListener {
	return &boundListener{conns: make(chan *callerConn), done: make(chan struct{}), addr: addr}
}

func (l *boundListener) add(c *callerConn) error {
	select {
	case l.conns <- c:
		return nil
	case <-l.done:
		return net.ErrClosed
	}
}

// Accept implements net.Listener.
func (l *boundListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener.
func (l *boundListener) Close() error {
	l.once.Do(func() { close(l.done) })
	return nil
}

// Addr implements net.Listener.
func (l *boundListener) Addr() net.Addr { return l.addr }

// answer is an HTTP response that is sent on a connection which is no longer a server's.
type answer struct {
	header http.Header
	status int
	body   bytes.Buffer
}

func (a *answer) Header() http.Header         { return a.header }
func (a *answer) WriteHeader(status int)      { a.status = status }
func (a *answer) Write(b []byte) (int, error) { return a.body.Write(b) }

func (a *answer) send(w io.Writer) error {
	res := http.Response{StatusCode: a.status, ProtoMajor: 1, ProtoMinor: 1, Header: a.header, ContentLength: int64(a.body.Len()), Body: io.NopCloser(&a.body)}
	return res.Write(w)
}

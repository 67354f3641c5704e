package unit

// switches are settings that are on or off and confine a program when on.
var switches = []string{
	"DevicePolicy", "DynamicUser", "LockPersonality", "MemoryDenyWriteExecute", "MountAPIVFS", "PrivateDevices", "PrivateIPC", "PrivateMounts", "PrivatePIDs",
	"PrivateUsers", "ProtectClock", "ProtectControlGroups", "ProtectHostname", "ProtectKernelLogs", "ProtectKernelModules", "ProtectKernelTunables", "RemoveIPC",
	"RestrictNamespaces", "RestrictRealtime", "RestrictSUIDSGID",
}

// confinement are other settings that confine a program.
var confinement = []string{
	"AppArmorProfile", "DeviceAllow", "ExecPaths", "ExecSearchPath", "IPAddressAllow", "IPAddressDeny", "KeyringMode", "NoExecPaths", "Personality", "ProcSubset",
	"ProtectProc", "RestrictAddressFamilies", "RestrictFileSystems", "RestrictNetworkInterfaces", "SecureBits", "SELinuxContext", "SmackProcessLabel",
	"SocketBindAllow", "SocketBindDeny", "SystemCallArchitectures", "SystemCallErrorNumber", "SystemCallFilter", "SystemCallLog",
}

// emptyMeansNothing are keys whose empty value says something.
var emptyMeansNothing = []string{"DeviceAllow", "SystemCallFilter"}

const (
	sayCondition = "whether a pod starts depends on no such condition; an init container can look and fail"
	sayLogs      = "what a pod writes is read by `tutti kubectl logs`; elsewhere nothing is written"
	sayExit      = "a container that ends with another exit status than 0 has failed, and either is started again"
	sayBack      = "the first start after an end comes at once or after 10 s, and then ever more rarely, up to 5 minutes apart"
	sayReload    = "Kubernetes has no reload; `tutti kubectl rollout restart` starts the program anew with what it is to read"
	sayTime      = "no such limit; a startupProbe says how long a start may take, activeDeadlineSeconds of a Job how long a run"
	sayWeight    = "say what the program needs in resources.requests.cpu: that is its weight too"
	sayIO        = "the disk is not divided among pods; the annotation process.tutti.dev/io gives a class"
	sayAlone     = "no other unit has a part in a pod; import it too, and have the pods find each other by their Services' names"
	sayCPU       = "there is no such setting for a pod; `taskset` or `chrt` before the command does it"
	sayCreds     = "make it a Secret and mount that as a volume"
	sayImage     = "the program would not have this machine's file system; make an image of it and name that in the place of `host`"
	saySocket    = "no socket is handed over to a pod's program; have it listen by itself"
)

// reasons say of settings why they have no equivalent and what to use
// instead. What none of it is said of has no meaning here at all.
var reasons = map[string]string{
	"Service.ExecReload":                sayReload,
	"Service.ExecCondition":             sayCondition,
	"Service.ExecStopPost":              "nothing runs when a container has ended; the next start can clean up first",
	"Service.RestartSec":                sayBack,
	"Service.RestartSteps":              sayBack,
	"Service.RestartMaxDelaySec":        sayBack,
	"Service.RestartMode":               sayBack,
	"Service.SuccessExitStatus":         sayExit,
	"Service.RestartPreventExitStatus":  sayExit,
	"Service.RestartForceExitStatus":    sayExit,
	"Service.RemainAfterExit":           "a Job that is complete stays so, and runs again only when it is made anew",
	"Service.GuessMainPID":              "what a container starts is its main process",
	"Service.ExitType":                  "a container ends with its first process",
	"Service.TimeoutStartSec":           sayTime,
	"Service.TimeoutSec":                sayTime,
	"Service.TimeoutAbortSec":           sayTime,
	"Service.TimeoutStartFailureMode":   sayTime,
	"Service.TimeoutStopFailureMode":    sayTime,
	"Service.RuntimeMaxSec":             sayTime,
	"Service.RuntimeRandomizedExtraSec": sayTime,
	"Service.WatchdogSec":               "a pod is not told by sd_notify that the program lives; a livenessProbe asks",
	"Service.WatchdogSignal":            "a pod is not told by sd_notify that the program lives; a livenessProbe asks",
	"Service.NotifyAccess":              "nobody listens to sd_notify",
	"Service.BusName":                   "a pod is not told by D-Bus that the program is ready; a readinessProbe asks (--port makes one)",
	"Service.Sockets":                   saySocket,
	"Service.FileDescriptorStoreMax":    saySocket,
	"Service.NonBlocking":               saySocket,
	"Service.StandardInput":             "a pod's standard input is empty; `stdin: true` keeps it open for `kubectl attach`",
	"Service.StandardInputText":         "a pod's standard input is empty; write the text into a ConfigMap",
	"Service.StandardInputData":         "a pod's standard input is empty; write the text into a ConfigMap",
	"Service.StandardOutput":            sayLogs,
	"Service.StandardError":             sayLogs,
	"Service.SyslogIdentifier":          sayLogs,
	"Service.SyslogFacility":            sayLogs,
	"Service.SyslogLevel":               sayLogs,
	"Service.SyslogLevelPrefix":         sayLogs,
	"Service.LogLevelMax":               sayLogs,
	"Service.LogExtraFields":            sayLogs,
	"Service.LogRateLimitIntervalSec":   sayLogs,
	"Service.LogRateLimitBurst":         sayLogs,
	"Service.LogNamespace":              sayLogs,
	"Service.LogFilterPatterns":         sayLogs,
	"Service.TTYPath":                   "`tty: true` gives the program a terminal, for `kubectl attach`",
	"Service.PassEnvironment":           "a pod inherits no environment; write the variables into env",
	"Service.SetLoginEnvironment":       "HOME, LOGNAME, USER and SHELL are set where the unit has a user",
	"Service.PAMName":                   "no PAM session is opened for a pod",
	"Service.UtmpIdentifier":            "a pod is no login",
	"Service.CPUWeight":                 sayWeight,
	"Service.CPUShares":                 sayWeight,
	"Service.StartupCPUWeight":          sayWeight,
	"Service.StartupCPUShares":          sayWeight,
	"Service.CPUQuotaPeriodSec":         "the period is 100 ms",
	"Service.AllowedCPUs":               sayCPU,
	"Service.AllowedMemoryNodes":        sayCPU,
	"Service.CPUAffinity":               sayCPU,
	"Service.NUMAPolicy":                sayCPU,
	"Service.NUMAMask":                  sayCPU,
	"Service.CPUSchedulingPolicy":       sayCPU,
	"Service.CPUSchedulingPriority":     sayCPU,
	"Service.CPUSchedulingResetOnFork":  sayCPU,
	"Service.TimerSlackNSec":            sayCPU,
	"Service.CoredumpFilter":            sayCPU,
	"Service.MemoryHigh":                "memory is not slowed down before its limit; say what the program may have in resources.limits.memory",
	"Service.MemorySwapMax":             "a pod has no limit of swap of its own",
	"Service.MemoryZSwapMax":            "a pod has no limit of swap of its own",
	"Service.MemoryPressureWatch":       "a pod is not told of pressure",
	"Service.ManagedOOMSwap":            "under pressure pods are evicted, those first that use more than they asked for",
	"Service.ManagedOOMMemoryPressure":  "under pressure pods are evicted, those first that use more than they asked for",
	"Service.ManagedOOMPreference":      "under pressure pods are evicted, those first that use more than they asked for",
	"Service.OOMPolicy":                 "what is killed when memory is short is the largest process, and the container ends with its first one",
	"Service.OOMScoreAdjust":            "comes from the pod's resources: requests that are equal to limits make it the last to be killed",
	"Service.TasksMax":                  "a pod has at most 1024 processes and threads; LimitNPROC limits those of a user",
	"Service.IOWeight":                  sayIO,
	"Service.IODeviceWeight":            sayIO,
	"Service.IOReadBandwidthMax":        sayIO,
	"Service.IOWriteBandwidthMax":       sayIO,
	"Service.IOReadIOPSMax":             sayIO,
	"Service.IOWriteIOPSMax":            sayIO,
	"Service.IODeviceLatencyTargetSec":  sayIO,
	"Service.BlockIOWeight":             sayIO,
	"Service.Slice":                     "control groups are the pods'; a ResourceQuota limits those of a namespace together",
	"Service.Delegate":                  "a pod's control group is not handed over to its program",
	"Service.FinalKillSignal":           "what ends a pod that does not end by itself is SIGKILL",
	"Service.SendSIGKILL":               "a pod that does not end within terminationGracePeriodSeconds is killed; make that longer",
	"Service.SendSIGHUP":                "only one signal is sent; a preStop hook can send another",
	"Service.RestartKillSignal":         "only one signal is sent; a preStop hook can send another",
	"Service.ReloadSignal":              sayReload,
	"Service.RootDirectory":             sayImage,
	"Service.RootDirectoryStartOnly":    sayImage,
	"Service.RootImage":                 sayImage,
	"Service.RootImageOptions":          sayImage,
	"Service.MountImages":               sayImage,
	"Service.ExtensionImages":           sayImage,
	"Service.ExtensionDirectories":      sayImage,
	"Service.LoadCredential":            sayCreds,
	"Service.LoadCredentialEncrypted":   sayCreds,
	"Service.SetCredential":             sayCreds,
	"Service.SetCredentialEncrypted":    sayCreds,
	"Service.ImportCredential":          sayCreds,
	"Service.OpenFile":                  saySocket,
	"Service.PrivateNetwork":            "a pod has a network of its own, and it reaches others; a NetworkPolicy is what can deny that",
	"Service.NetworkNamespacePath":      "a pod has a network of its own, or with hostNetwork the machine's",
	"Service.JoinsNamespaceOf":          sayAlone,
	"Service.IgnoreSIGPIPE":             "a broken pipe ends the program, unless it says otherwise",
	"Service.PermissionsStartOnly":      "init containers run as the program's user; runAsUser: 0 in their securityContext makes them root's",
	"Unit.OnFailure":                    sayAlone,
	"Unit.OnSuccess":                    sayAlone,
	"Unit.Conflicts":                    sayAlone,
	"Unit.JoinsNamespaceOf":             sayAlone,
	"Unit.PropagatesReloadTo":           sayReload,
	"Unit.ReloadPropagatedFrom":         sayReload,
	"Unit.PropagatesStopTo":             sayAlone,
	"Unit.StopPropagatedFrom":           sayAlone,
	"Unit.RequiresMountsFor":            "the machine's file systems are mounted when its pods start; a hostPath volume of type Directory waits for its directory",
	"Unit.WantsMountsFor":               "the machine's file systems are mounted when its pods start; a hostPath volume of type Directory waits for its directory",
	"Unit.DefaultDependencies":          "a machine is up when its pods start",
	"Unit.StopWhenUnneeded":             "a Deployment is there until it is deleted",
	"Unit.RefuseManualStart":            "who may start and stop is the matter of RBAC",
	"Unit.RefuseManualStop":             "who may start and stop is the matter of RBAC",
	"Unit.AllowIsolate":                 "a machine has no states that pods belong to",
	"Unit.IgnoreOnIsolate":              "a machine has no states that pods belong to",
	"Unit.FailureAction":                "nothing that happens to a pod restarts its machine",
	"Unit.SuccessAction":                "nothing that happens to a pod restarts its machine",
	"Unit.RebootArgument":               "nothing that happens to a pod restarts its machine",
	"Unit.SourcePath":                   "says where the unit comes from, and nothing of what runs",
	"Install.Alias":                     "a Deployment has one name; a Service is another name for its ports",
	"Install.Also":                      sayAlone,
	"Install.DefaultInstance":           "has been read",
	"X-Fleet.MachineID":                 "nodes are not chosen by their machine's id; nodeSelector with kubernetes.io/hostname chooses by name",
	"X-Fleet.Replaces":                  "no pod is stopped for another's sake but by priority; see priorityClassName",
}
